"""Passes forward and back through the dense model, and gradients by unit, each sequence's loss by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from liar.batches import Calibration
from liar.capture import Point, preserved, run_model, watching
from liar.errors import CalibrationError, ModelError, at_site
from liar.families import base_and_prefix
from liar.loss import drawn, labelled
from liar.outputs import Output, outputs
from liar.sites import Layout, Site, linear
from liar.statistics.normal import check_finite
from liar.streams import wide

# Batch i draws its labels with SEED + STRIDE * i: the outputs of one batch take the numbers between.
SEED, STRIDE = 0, 16
# What the classes of transformers that foretell the next token are called.
CAUSAL = ("ForCausalLM", "LMHeadModel")


def unit_gradients(model: nn.Module, layout: Layout, calibration: Calibration, progress: bool) -> dict[str, dict[str, Tensor]]:
    """By site: what the loss L does when a unit is scaled, or its weights; [units] float64 each.

    With m_u = 1 a factor on the channels of unit u where the consumer reads them, x, the derivative dL/dm_u is the sum of
    x * dL/dx over these channels and all tokens.

    - `gradient`: dL/dm_u, summed over the data.
    - `squared_gradient`: (dL/dm_u)^2 of each sequence's loss, summed over sequences (Kwon et al. 2022, section 4.1).
    - `weight_gradient`: |w * dL/dw|, dL/dw summed over the data, summed over the weights of the unit: rows (and biases) of the
      producers, columns of the consumer (Lee et al. 2019, section 4.1).

    L is the negative log-likelihood of the batches' `labels` (see `labelled`), or without labels that of labels drawn from
    the model's own predictions (see `drawn`), summed over the tokens of a sequence. Sequences do not see each other, so one
    backward pass through the sum over a batch gives the gradient of each by itself.

    Raises:
        CalibrationError: labels that do not fit, or NaN or Inf at a site, which it names.
        ModelError: parameters that gradients cannot be taken of.
    """
    _check_labels(model, calibration)
    blocks = [model.get_submodule(site.block) for site in layout.sites]
    points = {site.name: Point(linear(block, site.consumer), 0) for block, site in zip(blocks, layout.sites, strict=True)}
    weights = [weight for block, site in zip(blocks, layout.sites, strict=True) for weight in _weights(block, site)]
    bar = tqdm(total=calibration.tokens, desc="gradients", unit="tok", unit_scale=True, disable=not progress)
    with differentiable(model, calibration, weights) as ordinary, bar:
        parts = [_Sums(block, site) for block, site in zip(blocks, layout.sites, strict=True)]
        for number, keep in enumerate(calibration.keep):
            seen, said = look(model, layout, ordinary, number, points)
            reads = [seen[part.site.name] for part in parts]
            slopes = gradients(_loss(model, ordinary, number, said), [*reads, *weights])
            rest = iter(slopes[len(reads) :])
            for part, x, slope in zip(parts, reads, slopes[: len(reads)], strict=True):
                part.update(x, slope, [next(rest) for _ in part.weights])
            bar.update(int(keep.sum()))
    # From the last site to the first, as gradients flow: the one named is where NaN began.
    return {part.site.name: part.found() for part in reversed(parts)}


@contextmanager
def differentiable(model: nn.Module, calibration: Calibration, weights: Sequence[Tensor]) -> Iterator[Calibration]:
    """Record gradients of the given weights, and of all that is computed with them; the guest's state is restored.

    Yields:
        The calibration batches, as tensors that can be differentiated.

    Raises:
        ModelError: parameters that gradients cannot be taken of.
    """
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ModelError(
            f"{type(model).__name__}: expected parameters that gradients can be taken of, got some that were made inside "
            "torch.inference_mode: load the model outside of it"
        )
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    # The user may be in inference mode, where nothing can be differentiated.
    with torch.inference_mode(False), preserved(model):
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            for weight in weights:
                weight.requires_grad_(True)
            with torch.enable_grad():
                yield _ordinary(calibration)
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


def look(
    model: nn.Module, layout: Layout, calibration: Calibration, number: int, points: Mapping[str, Point]
) -> tuple[dict[str, Tensor], list[Output]]:
    """Run one batch: what passes the points, among them one named after every site, and what the model says.

    Raises:
        CalibrationError: NaN or Inf at a site, which it names, or in what the model says.
    """
    with watching(points) as seen:
        said = outputs(run_model(model, calibration.batches[number], number), calibration.keep[number])
    for site in layout.sites:
        with at_site(site.name, site.module):
            check_finite(seen[site.name])
    with at_site("output", type(model).__name__):
        check_finite(*(output.rows for output in said))
    return seen, said


def gradients(loss: Tensor, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Of a loss, never into the parameters' own `grad`; what the output does not look at has a gradient of zero."""
    return torch.autograd.grad(loss, values, materialize_grads=True)


def by_channel(x: Tensor, slope: Tensor) -> Tensor:
    """dL/dm of every sequence, with m = 1 a factor on a channel: [sequences, channels] float64.

    Args:
        x: what a consumer reads, [sequences, length, channels].
        slope: dL/dx, likewise.
    """
    return (wide(x.detach()) * slope).sum(1, dtype=torch.float64)


def _check_labels(model: nn.Module, calibration: Calibration) -> None:
    """What can be said of the labels before the first pass."""
    given = [labels is not None for labels in calibration.labels]
    if not any(given):
        return
    if not all(given):
        raise CalibrationError(
            f"calibration batch {given.index(False)}: expected labels, as other batches have them, got none; give all batches "
            "labels or none"
        )
    for number, labels in enumerate(calibration.labels):
        if not isinstance(labels, Tensor):
            raise CalibrationError(f"calibration batch {number}: expected labels as a tensor, got a {type(labels).__name__}")
    if base_and_prefix(model)[0] is model:
        raise CalibrationError(
            f"the calibration batches have labels, but {type(model).__name__} has no head to compare them with: give the model "
            "with its head, or leave the labels out"
        )


def _ordinary(calibration: Calibration) -> Calibration:
    """Copies of tensors that were made in inference mode: as they are, nothing they touch can be differentiated."""

    def copied(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) and value.is_inference() else value

    batches = ({name: copied(value) for name, value in batch.items()} for batch in calibration.batches)
    keep, labels = (tuple(copied(value) for value in values) for values in (calibration.keep, calibration.labels))
    return replace(calibration, batches=tuple(batches), keep=keep, labels=labels)


def _weights(block: nn.Module, site: Site) -> list[Tensor]:
    """What belongs to the units of a site: rows of weights and biases of the producers, last the consumer's weight."""
    producers = [linear(block, edge) for edge in site.producers]
    rows = [part for layer in producers for part in (layer.weight, layer.bias) if part is not None]
    return [*rows, linear(block, site.consumer).weight]


class _Sums:
    """Running sums over the data of the gradients at one site, float64."""

    def __init__(self, block: nn.Module, site: Site) -> None:
        self.site, self.weights = site, _weights(block, site)
        self.sums = [torch.zeros_like(weight, dtype=torch.float64) for weight in self.weights]
        self.gradient, self.squared = self.weights[-1].new_zeros(2, site.units, dtype=torch.float64)

    def update(self, x: Tensor, slope: Tensor, slopes: Sequence[Tensor]) -> None:
        """Add a batch: what the consumer reads and dL of it, [sequences, length, channels] each, and dL of the weights."""
        units = by_channel(x, slope).reshape(len(x), self.site.units, self.site.consumer.width).sum(2)
        self.gradient += units.sum(0)
        self.squared += units.square().sum(0)
        for total, part in zip(self.sums, slopes, strict=True):
            total += part

    def found(self) -> dict[str, Tensor]:
        """The three sums, [units] each."""
        products = [(weight.detach() * total).abs() for weight, total in zip(self.weights, self.sums, strict=True)]
        # The units are rows of the producers, but columns of the consumer.
        products[-1] = products[-1].T
        by_weight = torch.stack([part.reshape(self.site.units, -1).sum(1) for part in products]).sum(0)
        with at_site(self.site.name, self.site.module):
            check_finite(self.gradient, self.squared, by_weight, what="gradients")
        return {"gradient": self.gradient, "squared_gradient": self.squared, "weight_gradient": by_weight}


def _loss(model: nn.Module, calibration: Calibration, number: int, said: Sequence[Output]) -> Tensor:
    labels = calibration.labels[number]
    if labels is None:
        return drawn(said, SEED + STRIDE * number)
    causal = any(kind.__name__.endswith(CAUSAL) for kind in type(model).__mro__)
    try:
        return labelled(said, calibration.keep[number], labels, causal=causal)
    except CalibrationError as error:
        raise CalibrationError(f"calibration batch {number}: {error}") from error
