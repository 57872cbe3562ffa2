"""Gradient-based fine-tuning of the same mask, for comparison: no closed form, from the cut weights.

Sub-layer by sub-layer, the kept weights (and existing biases) of producers and consumer are trained for one pass over the same
tokens: AdamW, linear decay, mean squared error of the residual stream after the sub-layer against the dense model's, on the
pruned stream's inputs (the setting of Wagner et al. 2025, arXiv 2510.14444, at the granularity they recommend).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import liar
from benchmarks.baselines.apply import apply_step
from liar.repair import RepairStep, SiteState

LEARNING_RATE = 1e-3
# Tokens (padding included) per optimizer step, about; a longer sequence is a step of its own.
STEP = 512


def fine_tune(model: nn.Module, mask: liar.Mask, calib: Sequence[Any]) -> None:
    """Cut the model and train what is left, one sub-layer after the other."""
    apply_step(model, mask, small_batches(calib), FineTune())


def small_batches(calib: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The same sequences in batches of about `STEP` tokens: one optimizer step each."""
    small = []
    for batch in calib:
        count, length = batch["input_ids"].shape
        size = max(1, STEP // length)
        small += [{name: rows[i : i + size] for name, rows in batch.items()} for i in range(0, count, size)]
    return small


class FineTune(RepairStep):
    """Train the layers of a site so that the pruned stream after it comes near the dense one."""

    captures = frozenset({"stream"})

    def observe(self, site: SiteState, batch: int, dense: Mapping[str, Tensor]) -> None:
        """Keep the dense stream after the site."""
        site.put("target", batch, real_tokens(site, batch, dense["stream"]))

    def skip(self, site: SiteState) -> None:
        """The stream is the dense one."""
        site.discard("target")

    def repair(self, site: SiteState) -> None:
        """One pass over the batches, in a fixed random order (they are sorted by length)."""
        with trainable(site) as parameters:
            optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
            decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(site.walk.batches))
            for batch in torch.randperm(len(site.walk.batches), generator=torch.Generator().manual_seed(0)).tolist():
                # The block shares its other parameters with the user's model: those get no gradient.
                gradients = torch.autograd.grad(stream_error(site, batch), parameters)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
                decay.step()
        site.discard("target")


@contextmanager
def trainable(site: SiteState) -> Iterator[list[nn.Parameter]]:
    """The parameters of the site's layers, open to gradients; flags are restored, gradients dropped."""
    parameters = [
        parameter for layer in (*site.producers, site.consumer) for parameter in layer.module.parameters(recurse=False)
    ]
    flags = [parameter.requires_grad for parameter in parameters]
    try:
        with torch.enable_grad():
            for parameter in parameters:
                parameter.requires_grad_(True)
            yield parameters
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.grad = None
            parameter.requires_grad_(flag)


def stream_error(site: SiteState, batch: int) -> Tensor:
    """Mean squared error of the pruned stream after the site on one batch."""
    stream = site.run_batch(batch, "stream")["stream"]
    return nn.functional.mse_loss(real_tokens(site, batch, stream), site.get("target", batch))


def real_tokens(site: SiteState, batch: int, value: Tensor) -> Tensor:
    """The rows of real tokens: [sequences, length, channels] -> [tokens, channels]."""
    return value[site.calibration.token_masks[batch]]
