"""A search over widths by the model's own output, after Týr-the-Pruner (Li et al. 2025, arXiv 2503.09657): a small version.

Every site has candidates at several widths: units go in the order of OSSCAR's elimination, and what stays is refitted to the
layer's own output. An evolutionary search then moves width from one layer to another of the same kind, so that the parameters
stay, and keeps what has the least Kullback-Leibler divergence from the dense model on a few calibration sequences.

Differences: candidates are made from the dense model's inputs once; theirs are made in several rounds, ever finer, and each
layer sees those before it at the width that is expected of them. The search begins where all layers keep the same share, or,
as `searched_from_ours`, at the widths of this library's default selection.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div
from tqdm.auto import tqdm

import liar
from benchmarks.baselines.least_squares import damped
from benchmarks.baselines.osscar import DAMPING
from benchmarks.selections.budget import Budget
from benchmarks.selections.gradients import frozen_copy
from benchmarks.selections.inputs import Inputs, inputs_of
from liar.data import take
from liar.models import Layout, Site, layer_of
from liar.runtime import preserve_model_state, run_model

# Widths of a wide site: multiples of this share of its units.
STEP = 1 / 16
GENERATIONS = 30
OFFSPRING = 8
# Tokens that candidates are compared on, and how many of them are compared on the next number.
STAGES = ((512, 2), (2_048, 1))

Widths = dict[str, int]


@dataclass(frozen=True)
class Candidates:
    """What a site can be.

    Attributes:
        order: int64 [units], the unit that goes first comes first.
        inputs: for the refit.
        widths: that it may have, ascending, in equal steps.
    """

    order: Tensor
    inputs: Inputs
    widths: list[int]

    @classmethod
    def of(cls, site: Site, inputs: Inputs) -> Candidates:
        """Eliminate the units of a site."""
        step = max(round(STEP * site.units), 1)
        widths = list(range(site.units, 0, -step))[::-1]
        return cls(inputs.order(site.units), inputs, widths)

    def kept(self, width: int) -> Tensor:
        """Bool [units]."""
        kept = torch.ones(len(self.order), dtype=torch.bool)
        kept[self.order[: len(self.order) - width]] = False
        return kept

    def weight(self, width: int) -> Tensor:
        """The consumer's weight at a width, zero for what is removed: [channels, out] in the consumer's order."""
        kept = self.kept(width).repeat_interleave(len(self.inputs.channels) // len(self.order))
        gram, weight = self.inputs.gram, self.inputs.weight
        changed = torch.zeros_like(weight)
        damping = DAMPING * float(gram.diagonal().mean())
        changed[kept] = damped(gram[kept][:, kept], gram[kept] @ weight + damping * weight[kept], damping)
        return torch.empty_like(changed).index_copy_(0, self.inputs.channels, changed)


def select(model: nn.Module, batches: Sequence[Any], keep: float, seed: int, *, from_ours: bool = False) -> liar.Mask:
    """Make the candidates, and search."""
    layout = liar.discover(model)
    inputs = inputs_of(model, batches)
    candidates = {site.name: Candidates.of(site, inputs[site.name]) for site in layout.sites}
    begin = liar.select(model, batches, keep=keep, progress=False).masks if from_ours else same_share(model, layout, keep)
    parent = nearest({name: int(mask.sum()) for name, mask in begin.items()}, candidates, Budget.of(model, keep))
    parent = Search(model, layout, candidates, batches, seed).run(parent)
    return liar.Mask({name: candidates[name].kept(width) for name, width in parent.items()}, requested=keep)


def same_share(model: nn.Module, layout: Layout, keep: float) -> dict[str, Tensor]:
    """Of every site the same share, whichever units."""
    return Budget.of(model, keep).same_share({site.name: torch.zeros(site.units) for site in layout.sites}, layout.sites)


def nearest(wanted: Widths, candidates: Mapping[str, Candidates], budget: Budget) -> Widths:
    """Widths that there are candidates of: first the next smaller ones, then larger ones where most is missing."""
    found = {
        name: max([width for width in candidates[name].widths if width <= most], default=candidates[name].widths[0])
        for name, most in wanted.items()
    }
    left = budget.left - sum(budget.unit_costs[name] * width for name, width in found.items())
    for name in sorted(found, key=lambda name: (found[name] - wanted[name]) * budget.unit_costs[name]):
        larger = [width for width in candidates[name].widths if width > found[name]]
        cost = budget.unit_costs[name] * (larger[0] - found[name]) if larger else 0.0
        if larger and found[name] < wanted[name] and cost <= left:
            found[name], left = larger[0], left - cost
    return found


class Search:
    """An elitist evolution of one parent."""

    def __init__(
        self, model: nn.Module, layout: Layout, candidates: Mapping[str, Candidates], batches: Sequence[Any], seed: int
    ) -> None:
        self.layout, self.candidates, self.random = layout, candidates, random.Random(seed)
        self.calibration = liar.Calibration.of(batches, model)
        self.dense, self.model = model, frozen_copy(model)
        self.state: Widths = {}
        self.made: dict[tuple[str, int], Tensor] = {}

    @torch.inference_mode()
    def run(self, parent: Widths) -> Widths:
        """The best widths after all generations."""
        with preserve_model_state(self.dense), preserve_model_state(self.model):
            for _ in tqdm(range(GENERATIONS), desc="search", leave=False):
                alive = [self.mutated(parent) for _ in range(OFFSPRING)]
                for stage, (tokens, survivors) in enumerate(STAGES):
                    if stage == len(STAGES) - 1:
                        alive.append(parent)
                    batch = self.drawn(tokens)
                    alive = sorted(alive, key=lambda widths: self.divergence(widths, batch))[:survivors]
                (parent,) = alive
        return parent

    def mutated(self, parent: Widths) -> Widths:
        """Move one step of width from a layer to another of its kind, a few times."""
        child = dict(parent)
        for _ in range(min(self.random.randint(1, 4), self.random.randint(1, 4))):
            kind = self.random.choice([site.kind for site in self.layout.sites])
            names = [site.name for site in self.layout.of_kind(kind)]
            less = [name for name in names if child[name] > self.candidates[name].widths[0]]
            more = [name for name in names if child[name] < self.candidates[name].widths[-1]]
            one, other = (self.random.choice(choices) if choices else "" for choices in (less, more))
            if one and other and one != other:
                child[one], child[other] = self.next_width(one, child[one], -1), self.next_width(other, child[other], 1)
        return child

    def next_width(self, name: str, width: int, by: int) -> int:
        """The width of a site that is one step smaller (`by` -1) or larger (1)."""
        widths = self.candidates[name].widths
        return widths[widths.index(width) + by]

    def drawn(self, tokens: int) -> list[tuple[liar.Calibration, Tensor]]:
        """Random sequences with about so many tokens, each with the dense model's log-probabilities."""
        drawn, left = list[tuple[liar.Calibration, Tensor]](), tokens
        while left > 0:
            number = self.random.randrange(len(self.calibration.batches))
            row = self.random.randrange(len(self.calibration.token_masks[number]))
            part = take(self.calibration, [(number, torch.tensor([row]))])
            drawn.append((part, log_probabilities(self.dense, part)))
            left -= part.tokens
        return drawn

    def divergence(self, widths: Widths, drawn: Sequence[tuple[liar.Calibration, Tensor]]) -> float:
        """Mean Kullback-Leibler divergence of the dense predictions from those at these widths."""
        self.load(widths)
        total = tokens = 0.0
        for part, dense in drawn:
            total += float(kl_div(log_probabilities(self.model, part), dense, log_target=True, reduction="sum"))
            tokens += part.tokens
        return total / tokens

    def load(self, widths: Widths) -> None:
        """Give the model the candidates of these widths."""
        for site in self.layout.sites:
            name, width = site.name, widths[site.name]
            if self.state.get(name) != width:
                if (name, width) not in self.made:
                    self.made[name, width] = self.candidates[name].weight(width).float()
                consumer = layer_of(self.model.get_submodule(site.block), site.consumer)
                consumer.write(self.made[name, width].double(), consumer.initial_weights()[1])
        self.state = dict(widths)


def log_probabilities(model: nn.Module, part: liar.Calibration) -> Tensor:
    """Of the next token after every real one of the only batch: [tokens, vocabulary]."""
    logits: Tensor = run_model(model, part.batches[0]).logits
    return logits[part.token_masks[0]].float().log_softmax(-1)
