"""A gradient-based polish of the same mask, for comparison: no closed form, from the cut weights.

Sub-layer by sub-layer, the kept weights (and the biases that are there) of producers and consumer are trained for one pass over
the same tokens: AdamW, linear decay, mean squared error of the residual stream after the sub-layer against the dense model's,
on the pruned stream's inputs (the setting of Wagner et al. 2025, arXiv 2510.14444, at the granularity they recommend).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import liar
from liar import slim
from liar.batches import Calibration
from liar.capture import Point, preserved, run, watching
from liar.sites import Site, linear
from liar.streams import residual
from rivals.walk import Walk

LEARNING_RATE = 1e-3
# Tokens (padding included) per step, about; a longer sequence is a step of its own.
STEP = 512


def polish(model: nn.Module, mask: liar.Mask, calib: Sequence[Any]) -> None:
    """Cut the model and train what is left, one sub-layer after the other."""
    with preserved(model):
        walk = Walk(model, mask, Calibration.of(steps(calib), model), frozenset({"kept_inputs", "dense_sum", "residual"}))
        students = [polished(walk, number) for number in range(len(walk.blocks))]
    walk.finish(students)


def steps(calib: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The same sequences in batches of about `STEP` tokens: one optimizer step each."""
    small = []
    for batch in calib:
        count, length = batch["input_ids"].shape
        size = max(1, STEP // length)
        small += [{name: rows[i : i + size] for name, rows in batch.items()} for i in range(0, count, size)]
    return small


def polished(walk: Walk, number: int) -> nn.Module:
    """The cut and trained copy of a block."""
    student = slim.student(walk.blocks[number])
    rows = walk.dense_rows(number)
    for site in walk.sites(number):
        if walk.mask.whole(site.name) and not walk.changed:
            continue
        walk.changed = True
        slim.cut_site(student, site, walk.mask[site.name])
        sizes = [int(keep.sum()) for keep in walk.calibration.keep]
        train(walk, number, student, site, torch.split(rows.pop(site.name)["dense_sum"], sizes))
    walk.advance(number, student)
    return student


def train(walk: Walk, number: int, student: nn.Module, site: Site, targets: Sequence[Tensor]) -> None:
    """One pass over the batches, in a fixed random order (they are sorted by length)."""
    layers = [linear(student, edge) for edge in (*site.producers, site.consumer)]
    parameters = [parameter for layer in layers for parameter in layer.parameters(recurse=False)]
    trained = [parameter.requires_grad for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(targets))
    with torch.enable_grad():
        for parameter in parameters:
            parameter.requires_grad_(True)
        for i in torch.randperm(len(targets), generator=torch.Generator().manual_seed(0)).tolist():
            # The blocks share their other parameters with the guest's model: those get no gradient.
            gradients = torch.autograd.grad(loss(walk, number, student, site, i, targets[i]), parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            decay.step()
    for parameter, before in zip(parameters, trained, strict=True):
        parameter.grad = None
        parameter.requires_grad_(before)


def loss(walk: Walk, number: int, student: nn.Module, site: Site, i: int, target: Tensor) -> Tensor:
    """Mean squared error of the pruned stream after the sub-layer on batch i; `target` [tokens, out]."""
    points = {"out": Point(linear(student, site.consumer), None), "residual": residual(student, site)}
    with watching(points, stop_after=2) as seen:
        run(student, walk.pruned[i], walk.calls[number][i])
    return nn.functional.mse_loss(walk.tokens(seen["residual"] + seen["out"], i), target)
