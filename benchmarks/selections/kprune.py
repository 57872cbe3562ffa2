"""K-prune (Park et al. 2024, arXiv 2308.03449), the selection: knowledge measurement and knowledge-preserving mask search.

Sub-layer by sub-layer from the bottom. Of the model as it is by then, the knowledge of every unit that is not decided yet is
measured; the budget is shared among all of them by one threshold; in this sub-layer what is below it goes, and the weights that
stay are tuned (the rule `kprune`), so that the next measurement sees what has been done. Only the mask is given back.

Knowledge is measured as in the authors' code: by channel, a head having the mean of its channels. At the first sub-layer
nothing has been removed yet, so the divergence is at its least and predictive knowledge is zero: there the other decides.

Differences: the budget is of block parameters, not of FLOPs, and one unit of every site has to stay. The coefficients are those
of the authors' example, for every task and model. They prune encoders with a classifier; where a model says something of every
token, a sequence counts with the mean over its tokens, and where it has no head, with the squared change of its mean hidden
state relative to the size of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rivals import kprune as tuning
from rivals.site_data import SiteData
from torch import Tensor, nn
from torch.nn.functional import kl_div

import liar
from liar.batches import Calibration
from liar.capture import Point, preserved, run_model, watching
from liar.families import discover
from liar.outputs import Output, outputs
from liar.sites import Layout, Site, linear
from liar.streams import around, residual
from selections.budget import Budget, masks, ranked
from selections.slopes import open_from, probe, slopes

# Coefficients of representational knowledge beside predictive knowledge (lambda) and of heads beside neurons (mu), and the
# temperature of softmax: as in the example of the authors' code, BERT-base on MRPC.
REPRESENTATION = 2.5e-4
HEADS = 64.0
TEMPERATURE = 2.0


@dataclass(frozen=True)
class Dense:
    """What the dense model says of every batch, and its stream after every site, [tokens, out] by site name."""

    said: list[list[Output]]
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
    layout, budget = discover(model), Budget.of(model, keep)
    calibration, pruned = Calibration.of(batches, model), probe(model)
    kept: dict[str, Tensor] = {}
    with preserved(pruned):
        dense = seen_dense(pruned, layout, calibration)
        for number, site in enumerate(layout.sites):
            undecided = layout.sites[number:]
            found = measured(pruned, undecided, calibration, dense)
            worth = {other.name: score(found.knowledge[other.name], other, budget) for other in undecided}
            units = [unit for unit in budget.prefix(ranked(worth, undecided)) if unit[0] is site]
            kept |= masks(units, [site])
            budget = budget.without(units)
            if not all(row.all() for row in kept.values()):
                tune(pruned, site, kept[site.name], found, dense)
    return liar.Mask(kept, asked=keep)


def score(knowledge: Tensor, site: Site, budget: Budget) -> Tensor:
    """Importance of the units of a site per parameter: [channels] -> [units]."""
    by_unit = knowledge.reshape(site.units, -1).mean(1).cpu()
    return by_unit * (HEADS if site.kind == "heads" else 1.0) / budget.prices[site.name]


def seen_dense(model: nn.Module, layout: Layout, calibration: Calibration) -> Dense:
    """One pass of the model while it is dense."""
    points: dict[str, Point] = {}
    for name in layout.blocks:
        points |= around(model.get_submodule(name), layout.of_block(name))
    said, sums = [], dict[str, list[Tensor]]({site.name: [] for site in layout.sites})
    for number, keep in enumerate(calibration.keep):
        with watching(points) as seen:
            rows = outputs(run_model(model, calibration.batches[number], number), keep)
        said.append([replace(output, rows=output.rows.detach()) for output in rows])
        for name, total in sums.items():
            total.append((seen[f"{name} residual"] + seen[f"{name} out"])[keep])
    return Dense(said, {name: torch.cat(total) for name, total in sums.items()})


def measured(pruned: nn.Module, sites: Sequence[Site], calibration: Calibration, dense: Dense) -> Measured:
    """Knowledge of all channels of these sites (knowledge measurement): predictive plus lambda times representational.

    - predictive: half the square of how the distance from the dense predictions moves with a factor on the channel; the
      distance is a mean over a batch, the squares are summed over batches and divided by the sequences.
    - representational: mean square of what the channel adds to the output of its sub-layer, over tokens and output channels.
      (What two channels of a head add together is left out.)
    """
    consumers = {site.name: linear(pruned.get_submodule(site.block), site.consumer) for site in sites}
    points = {name: Point(consumer, 0) for name, consumer in consumers.items()}
    points["residual"] = residual(pruned.get_submodule(sites[0].block), sites[0])
    knowledge = {name: torch.zeros_like(consumer.weight[0], dtype=torch.float64) for name, consumer in consumers.items()}
    inputs, stream = [], []
    open_from(pruned, sites[0])
    for number, keep in enumerate(calibration.keep):
        with torch.enable_grad(), watching(points) as seen:
            said = outputs(run_model(pruned, calibration.batches[number], number), keep)
            found = slopes(distance(said, dense.said[number], keep), [seen[name] for name in consumers])
        for (name, consumer), slope in zip(consumers.items(), found, strict=True):
            predictive = (slope.sum(0) / len(keep)).square() / 2
            size = seen[name].detach()[keep].square().sum(0, dtype=torch.float64) * consumer.weight.square().mean(0)
            knowledge[name] += predictive / calibration.sequences + REPRESENTATION * size / calibration.tokens
        inputs.append(seen[sites[0].name].detach()[keep])
        stream.append(seen["residual"].detach()[keep])
    return Measured(knowledge, torch.cat(inputs), torch.cat(stream))


def distance(said: Sequence[Output], dense: Sequence[Output], keep: Tensor) -> Tensor:
    """Of what a model says of a batch from what the dense model says, summed over sequences: a scalar.

    Of classes, the divergence KL(dense || said) at a temperature, times its square; of numbers, the squared difference.
    """
    return torch.stack([_distance(one, other, keep) for one, other in zip(said, dense, strict=True)]).mean()


def _distance(output: Output, dense: Output, keep: Tensor) -> Tensor:
    if output.probable:
        one, other = ((rows / TEMPERATURE).log_softmax(-1) for rows in (output.rows, dense.rows))
        each = TEMPERATURE**2 * kl_div(one, other, log_target=True, reduction="none").sum(-1)
    else:
        each = (output.rows - dense.rows).square().mean(-1)
    if output.name == "hidden":
        each = each / dense.rows.square().mean(-1).clamp_min(torch.finfo(each.dtype).tiny)
    if output.by_token:
        lengths = keep.sum(1)
        each = each / lengths.repeat_interleave(lengths)
    return each.sum()


def tune(pruned: nn.Module, site: Site, keep: Tensor, found: Measured, dense: Dense) -> None:
    """Give the consumer of a site the tuned weights of what is kept, and zeros for the rest."""
    consumer, kept = linear(pruned.get_submodule(site.block), site.consumer), site.consumer.channels(keep)
    weight, empty = consumer.weight.detach().double().T, torch.empty(0)
    data = SiteData(
        kind=site.kind,
        kept=kept,
        unit=torch.arange(int(keep.sum())).repeat_interleave(site.consumer.width),
        weight=weight,
        bias=None if consumer.bias is None else consumer.bias.detach().double(),
        dense_inputs=empty,
        inputs=empty,
        kept_inputs=found.inputs[:, kept],
        dense_sum=dense.sums[site.name],
        residual=found.residual,
    )
    tuned, _ = tuning.RULE.solve(data)
    changed = torch.zeros_like(weight)
    changed[kept] = tuned
    consumer.weight.data.copy_(changed.T)
