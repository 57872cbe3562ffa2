"""K-prune (Park et al. 2024, arXiv 2308.03449), the selection: knowledge measurement and knowledge-preserving mask search.

Sub-layer by sub-layer from the bottom. Of the model as it is by then, the knowledge of every unit that is not decided yet is
measured; the budget is shared among all of them by one threshold; in this sub-layer what is below it goes, and the weights that
stay are tuned (the rule `kprune`), so that the next measurement sees what has been done. Only the mask is given back.

Knowledge is measured as in the authors' code: by channel, a head having the mean of its channels. At the first sub-layer
nothing has been removed yet, so the divergence is at its least and predictive knowledge is zero: there the other decides.

Differences: the budget is of block parameters, not of FLOPs, and one unit of every site has to stay. The coefficients are those
of the authors' example, for every task and model. They prune encoders with a classifier; where a model has an output for every
token, a sequence counts with the mean over its tokens, and where it has no head, with the squared change of its mean hidden
state relative to the size of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

import liar
from benchmarks.baselines import kprune as tuning
from benchmarks.baselines.site_data import SiteData
from benchmarks.selections.budget import Budget, masks, ranked
from benchmarks.selections.gradients import channel_gradients, frozen_copy, record_from
from liar.models import LayerView, Layout, Site, layer_of
from liar.runtime import (
    Output,
    Point,
    capture_activations,
    model_outputs,
    preserve_model_state,
    residual_points,
    residual_sum,
    run_model,
)

# Coefficients of representational knowledge beside predictive knowledge (lambda) and of heads beside neurons (mu), and the
# temperature of softmax: as in the example of the authors' code, BERT-base on MRPC.
REPRESENTATION = 2.5e-4
HEADS = 64.0
TEMPERATURE = 2.0


@dataclass(frozen=True)
class Dense:
    """The dense model's outputs for every batch, and its stream after every site, [tokens, out] by site name."""

    outputs: list[list[Output]]
    sums: dict[str, Tensor]


@dataclass(frozen=True)
class Measured:
    """Of the model as it is by now.

    Attributes:
        knowledge: site name -> [channels], of the sites that are not decided yet.
        inputs: [tokens, channels], what the consumer of the first of these sites reads.
        residual: [tokens, out], the stream that its output is added to.
    """

    knowledge: dict[str, Tensor]
    inputs: Tensor
    residual: Tensor


def select(model: nn.Module, batches: Sequence[Any], keep: float, seed: int) -> liar.Mask:
    """Measure, decide and tune one site after the other; nothing is random."""
    layout, budget = liar.discover(model), Budget.of(model, keep)
    calibration, pruned = liar.Calibration.of(batches, model), frozen_copy(model)
    unit_masks: dict[str, Tensor] = {}
    with preserve_model_state(pruned):
        dense = run_dense(pruned, layout, calibration)
        for number, site in enumerate(layout.sites):
            undecided = layout.sites[number:]
            measured = measure(pruned, undecided, calibration, dense)
            scores = {other.name: score(measured.knowledge[other.name], other, budget) for other in undecided}
            units = [unit for unit in budget.prefix(ranked(scores, undecided)) if unit[0] is site]
            unit_masks |= masks(units, [site])
            budget = budget.without(units)
            if not all(unit_mask.all() for unit_mask in unit_masks.values()):
                tune(pruned, site, unit_masks[site.name], measured, dense)
    return liar.Mask(unit_masks, requested=keep)


def score(knowledge: Tensor, site: Site, budget: Budget) -> Tensor:
    """Importance of the units of a site per parameter: [channels] -> [units]."""
    by_unit = knowledge[site.consumer.by_unit(site.units)].mean(1).cpu()
    return by_unit * (HEADS if site.kind == "heads" else 1.0) / budget.unit_costs[site.name]


def consumer_of(model: nn.Module, site: Site) -> LayerView:
    """The consumer of a site inside its model."""
    return layer_of(model.get_submodule(site.block), site.consumer)


def run_dense(model: nn.Module, layout: Layout, calibration: liar.Calibration) -> Dense:
    """One pass of the model while it is dense."""
    points: dict[str, Point] = {}
    for site in layout.sites:
        around = residual_points(model.get_submodule(site.block), site)
        around["output"] = Point(consumer_of(model, site).module, None)
        points |= {f"{site.name} {name}": point for name, point in around.items()}
    outputs, sums = [], dict[str, list[Tensor]]({site.name: [] for site in layout.sites})
    for number, token_mask in enumerate(calibration.token_masks):
        with capture_activations(points) as activations:
            returned = model_outputs(run_model(model, calibration.batches[number], number), token_mask)
        outputs.append([replace(output, rows=output.rows.detach()) for output in returned])
        for site in layout.sites:
            prefix = f"{site.name} "
            own = {name.removeprefix(prefix): value for name, value in activations.items() if name.startswith(prefix)}
            sums[site.name].append((residual_sum(own, site) + own["output"])[token_mask])
    return Dense(outputs, {name: torch.cat(rows) for name, rows in sums.items()})


def measure(pruned: nn.Module, sites: Sequence[Site], calibration: liar.Calibration, dense: Dense) -> Measured:
    """Knowledge of all channels of these sites (knowledge measurement): predictive plus lambda times representational.

    - predictive: half the square of the gradient of the distance from the dense predictions with respect to a factor on the
      channel; the distance is a mean over a batch, the squares are summed over batches and divided by the sequences.
    - representational: mean square of what the channel adds to the output of its sub-layer, over tokens and output channels.
      (What two channels of a head add together is left out.)
    """
    consumers = {site.name: consumer_of(pruned, site) for site in sites}
    points = {name: Point(consumer.module, 0) for name, consumer in consumers.items()}
    points |= residual_points(pruned.get_submodule(sites[0].block), sites[0])
    knowledge = {name: consumer.matrix.new_zeros(consumer.size("in")).double() for name, consumer in consumers.items()}
    inputs, stream = [], []
    record_from(pruned, sites[0])
    for number, token_mask in enumerate(calibration.token_masks):
        with torch.enable_grad(), capture_activations(points) as activations:
            outputs = model_outputs(run_model(pruned, calibration.batches[number], number), token_mask)
            loss = distance(outputs, dense.outputs[number], token_mask)
            by_consumer = channel_gradients(loss, [activations[name] for name in consumers])
        for (name, consumer), gradient in zip(consumers.items(), by_consumer, strict=True):
            predictive = (gradient.sum(0) / len(token_mask)).square() / 2
            rows = activations[name].detach()[token_mask]
            size = rows.square().sum(0, dtype=torch.float64) * consumer.matrix.square().mean(1)
            knowledge[name] += predictive / calibration.sequences + REPRESENTATION * size / calibration.tokens
        inputs.append(activations[sites[0].name].detach()[token_mask])
        stream.append(residual_sum(activations, sites[0]).detach()[token_mask])
    return Measured(knowledge, torch.cat(inputs), torch.cat(stream))


def distance(outputs: Sequence[Output], dense: Sequence[Output], token_mask: Tensor) -> Tensor:
    """Of a model's outputs for a batch from the dense model's, summed over sequences: a scalar.

    Of classes, the divergence KL(dense || model) at a temperature, times its square; of numbers, the squared difference.
    """
    return torch.stack([_distance(one, other, token_mask) for one, other in zip(outputs, dense, strict=True)]).mean()


def _distance(output: Output, dense: Output, token_mask: Tensor) -> Tensor:
    if output.kind == "classes":
        one, other = ((rows / TEMPERATURE).log_softmax(-1) for rows in (output.rows, dense.rows))
        each = TEMPERATURE**2 * kl_div(one, other, log_target=True, reduction="none").sum(-1)
    else:
        each = (output.rows - dense.rows).square().mean(-1)
    if output.name == "hidden":
        each = each / dense.rows.square().mean(-1).clamp_min(torch.finfo(each.dtype).tiny)
    if output.by_token:
        lengths = token_mask.sum(1)
        each = each / lengths.repeat_interleave(lengths)
    return each.sum()


def tune(pruned: nn.Module, site: Site, unit_mask: Tensor, measured: Measured, dense: Dense) -> None:
    """Give the consumer of a site the tuned weights of what is kept, and zeros for the rest."""
    consumer, kept, empty = consumer_of(pruned, site), site.consumer.channels(unit_mask), torch.empty(0)
    weight, bias = consumer.initial_weights()
    data = SiteData(
        kind=site.kind,
        kept=kept,
        unit=torch.arange(int(unit_mask.sum())).repeat_interleave(site.consumer.width),
        weight=weight,
        bias=None if consumer.bias is None else bias,
        dense_inputs=empty,
        inputs=empty,
        kept_inputs=measured.inputs[:, kept],
        dense_sum=dense.sums[site.name],
        residual=measured.residual,
    )
    tuned, _ = tuning.RULE.solve(data)
    changed = torch.zeros_like(weight)
    changed[kept] = tuned
    consumer.write(changed, bias)
