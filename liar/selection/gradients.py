"""Passes forward and back through the dense model, and gradients by unit, each sequence's loss by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from liar.data import Calibration
from liar.errors import CalibrationError, at_site
from liar.models import Edge, LayerView, Layout, Site, base_and_prefix, layer_of
from liar.progress import Progress
from liar.runtime import Output, Point, by_sequence, capture_activations, distributed, outputs_of, record_gradients, widen
from liar.selection.loss import label_loss, sampled_label_loss
from liar.statistics import Collectives, check_finite

# Endings of the names of transformers' classes that predict the next token.
CAUSAL = ("ForCausalLM", "LMHeadModel")


def unit_gradients(
    model: nn.Module, layout: Layout, calibration: Calibration, progress: Progress
) -> dict[str, dict[str, Tensor]]:
    """By site: what the loss L does when a unit is scaled, or its weights; [units] float64 each.

    With m_u = 1 a factor on the channels of unit u where the consumer reads them, x, the derivative dL/dm_u is the sum of
    x * dL/dx over these channels and all tokens.

    - `gradient`: dL/dm_u, summed over the data.
    - `squared_gradient`: (dL/dm_u)^2 of each sequence's loss, summed over sequences (Kwon et al. 2022, section 4.1).
    - `weight_gradient`: |w * dL/dw|, dL/dw summed over the data, summed over the weights of the unit: rows (and biases) of the
      producers, columns of the consumer (Lee et al. 2019, section 4.1).

    L is the negative log-likelihood of the batches' `labels` (see `label_loss`), or without labels that of labels sampled
    from the model's own predictions (see `sampled_label_loss`), summed over the tokens of a sequence. Sequences do not see
    each other, so one backward pass through the sum over a batch gives the gradient of each by itself.

    Raises:
        CalibrationError: labels that do not fit, or NaN or Inf at a site, which it names.
        ModelError: parameters that gradients cannot be taken of.
    """
    _check_labels(model, calibration)
    calibration = distributed.share(calibration, model)
    # The user may be in inference mode, whose tensors cannot be added to outside of it.
    with torch.inference_mode(False):
        sums = [UnitGradients(model.get_submodule(site.block), site) for site in layout.sites]
    points = {part.site.name: Point(part.layers[-1].module, 0) for part in sums}
    weights = [weight for part in sums for weight in part.weights]
    with record_gradients(model, weights), progress.stage("gradients", calibration.own_tokens) as advance:
        ordinary = differentiable(calibration)
        for number, token_mask in enumerate(ordinary.token_masks):
            with capture_activations(points) as activations:
                outputs = outputs_of(model, ordinary, number)
            for part in sums:
                with at_site(part.site.name, part.site.module):
                    check_finite(activations[part.site.name])
            check_outputs(model, outputs)
            inputs = [activations[part.site.name] for part in sums]
            all_gradients = gradients(_loss(model, ordinary, number, outputs), [*inputs, *weights])
            rest = iter(all_gradients[len(inputs) :])
            for part, x, gradient in zip(sums, inputs, all_gradients[: len(inputs)], strict=True):
                tokens = ordinary.of_stack(part.site.stack).token_masks[number]
                own = [next(rest) for _ in part.weights]
                part.update(by_sequence(x, tokens), by_sequence(gradient, tokens), own)
            advance(int(token_mask.sum()))
    for part in sums:
        part.reduce(distributed)
    # From the last site to the first, as gradients flow: the one named is where NaN began.
    return {part.site.name: part.result() for part in reversed(sums)}


def check_outputs(model: nn.Module, outputs: Sequence[Output]) -> None:
    """Check that the outputs of a batch are finite.

    Raises:
        CalibrationError: they are not.
    """
    with at_site("output", type(model).__name__):
        check_finite(*(output.rows for output in outputs))


def differentiable(calibration: Calibration) -> Calibration:
    """Copies of tensors that were made in inference mode: as they are, nothing they touch can be differentiated."""

    def copied(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) and value.is_inference() else value

    batches = ({name: copied(value) for name, value in batch.items()} for batch in calibration.batches)
    masks, labels = (tuple(copied(value) for value in values) for values in (calibration.token_masks, calibration.labels))
    encoder = None if calibration.encoder is None else differentiable(calibration.encoder)
    return replace(calibration, batches=tuple(batches), token_masks=masks, labels=labels, encoder=encoder)


def gradients(loss: Tensor, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Of a loss, never into the parameters' own `grad`; what the output does not look at has a gradient of zero."""
    return torch.autograd.grad(loss, values, materialize_grads=True)


def by_channel(x: Tensor, gradient: Tensor) -> Tensor:
    """dL/dm of every sequence, with m = 1 a factor on a channel: [sequences, channels] float64.

    Args:
        x: what a consumer reads, [sequences, length, channels].
        gradient: dL/dx, likewise.
    """
    return (widen(x.detach()) * gradient).sum(1, dtype=torch.float64)


def _check_labels(model: nn.Module, calibration: Calibration) -> None:
    """What can be checked of the labels before the first pass."""
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


class UnitGradients:
    """Running sums over the data of the gradients at one site, float64."""

    def __init__(self, block: nn.Module, site: Site) -> None:
        self.site = site
        self.layers: list[LayerView] = [layer_of(block, edge) for edge in site.edges]
        self.weights: list[Tensor] = [
            part for layer in self.layers[:-1] for part in (layer.weight, layer.bias) if part is not None
        ]
        # The consumer's bias belongs to no unit.
        self.weights.append(self.layers[-1].weight)
        self.sums = [torch.zeros_like(weight, dtype=torch.float64) for weight in self.weights]
        self.gradient, self.squared = self.weights[-1].new_zeros(2, site.units, dtype=torch.float64)

    def update(self, x: Tensor, gradient: Tensor, weight_gradients: Sequence[Tensor]) -> None:
        """Add a batch: what the consumer reads and dL of it, [sequences, length, channels] each, and dL of the weights."""
        units = by_channel(x, gradient)[:, self.site.consumer.by_unit(self.site.units)].sum(2)
        self.gradient += units.sum(0)
        self.squared += units.square().sum(0)
        for total, part in zip(self.sums, weight_gradients, strict=True):
            total += part

    def merge(self, other: UnitGradients) -> None:
        """Add another's batches. `other` keeps its content."""
        self.gradient += other.gradient
        self.squared += other.squared
        for total, part in zip(self.sums, other.sums, strict=True):
            total += part

    def reduce(self, processes: Collectives) -> None:
        """Add the batches of all processes."""
        processes.add(self.gradient, self.squared, *self.sums)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later."""
        return {
            "gradient": self.gradient.clone(),
            "squared": self.squared.clone(),
            "sums": [total.clone() for total in self.sums],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the content by what `state_dict` gave."""
        self.gradient, self.squared = state["gradient"].clone(), state["squared"].clone()
        self.sums = [total.clone() for total in state["sums"]]

    def result(self) -> dict[str, Tensor]:
        """The three sums, [units] each."""
        products = iter([(weight.detach() * total).abs() for weight, total in zip(self.weights, self.sums, strict=True)])
        by_weight = torch.zeros_like(self.gradient)
        for layer, edge in zip(self.layers, self.site.edges, strict=True):
            by_weight += self._by_unit(edge, layer.as_matrix(next(products)))
            if edge.axis == "out" and layer.bias is not None:
                by_weight += self._by_unit(edge, next(products)[None])
        with at_site(self.site.name, self.site.module):
            check_finite(self.gradient, self.squared, by_weight, what="gradients")
        return {"gradient": self.gradient, "squared_gradient": self.squared, "weight_gradient": by_weight}

    def _by_unit(self, edge: Edge, values: Tensor) -> Tensor:
        """Sums over all that belongs to a unit: [in, out] -> [units]."""
        rows = values.T if edge.axis == "out" else values
        return rows[edge.by_unit(self.site.units)].sum((1, 2))


def _loss(model: nn.Module, calibration: Calibration, number: int, outputs: Sequence[Output]) -> Tensor:
    labels, token_mask = calibration.labels[number], calibration.token_masks[number]
    if labels is None:
        return sampled_label_loss(outputs, token_mask, calibration.starts[number])
    causal = any(kind.__name__.endswith(CAUSAL) for kind in type(model).__mro__)
    try:
        return label_loss(outputs, token_mask, labels, causal=causal)
    except CalibrationError as error:
        raise CalibrationError(f"calibration batch {calibration.numbers[number]}: {error}") from error
