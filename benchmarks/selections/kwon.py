"""Kwon et al. 2022 (arXiv 2204.09656), stages 1 and 2: mask search and mask rearrangement. Stage 3 is the rule `mask_tuning`.

The loss of removing the units where the mask m is 0 is (1-m)' I (1-m) / 2, I the Fisher information of m. The search takes its
diagonal (section 4.1, algorithm 1), the rearrangement its diagonal blocks, one per site (section 4.2).

Differences: the budget is of block parameters, not of FLOPs or latency, and one unit of every site has to stay. No labels are
used: they are sampled from the model's own predictions. I is summed over sequences, in the authors' code over mini-batches. The
best of all swaps is made as long as one is of use; their code goes through the kept units of a layer once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import liar
from benchmarks.selections.budget import Budget, Unit, masks, ranked
from benchmarks.selections.gradients import channel_gradients, frozen_copy, record_from
from liar.models import Layout, layer_of
from liar.runtime import Point, capture_activations, model_outputs, preserve_model_state, run_model
from liar.selection.loss import sampled_label_loss

# A swap that lowers the form by less than this share of the trace may be rounding.
ROUNDING = 1e-12


def select(model: nn.Module, batches: Sequence[Any], keep: float, seed: int) -> liar.Mask:
    """Search with the diagonal of the Fisher information, then rearrange with its blocks; nothing is random."""
    layout, budget = liar.discover(model), Budget.of(model, keep)
    by_site = sequence_gradients(model, batches)
    unit_masks = search({name: rows.square().sum(0) for name, rows in by_site.items()}, layout, budget)
    return liar.Mask({name: rearranged(rows.T @ rows, unit_masks[name]) for name, rows in by_site.items()}, requested=keep)


def sequence_gradients(model: nn.Module, batches: Sequence[Any]) -> dict[str, Tensor]:
    """dL/dm of every sequence by site, [sequences, units] float64: as in the library, with the same labels, before sums."""
    layout, calibration, copied = liar.discover(model), liar.Calibration.of(batches, model), frozen_copy(model)
    points = {site.name: Point(layer_of(copied.get_submodule(site.block), site.consumer).module, 0) for site in layout.sites}
    by_site: dict[str, list[Tensor]] = {site.name: [] for site in layout.sites}
    record_from(copied, layout.sites[0])
    with preserve_model_state(copied), torch.enable_grad():
        for number, token_mask in enumerate(calibration.token_masks):
            with capture_activations(points) as activations:
                outputs = model_outputs(run_model(copied, calibration.batches[number], number), token_mask)
            loss = sampled_label_loss(outputs, token_mask, calibration.starts[number])
            inputs = [activations[site.name] for site in layout.sites]
            for site, rows in zip(layout.sites, channel_gradients(loss, inputs), strict=True):
                by_site[site.name].append(rows[:, site.consumer.by_unit(site.units)].sum(2).cpu())
    return {name: torch.cat(rows) for name, rows in by_site.items()}


def search(importance: Mapping[str, Tensor], layout: Layout, budget: Budget) -> dict[str, Tensor]:
    """Algorithm 1: of every number of heads, with as many neurons as still fit, what loses least; bool [units] by site.

    With one cost for all heads and one for all neurons no other mask of this cost loses less.

    Args:
        importance: site name -> [units], not negative.
        layout: the model's sites.
        budget: fits one unit of every site.
    """
    heads, neurons = (ranked(importance, layout.of_kind(kind)) for kind in ("heads", "neurons"))
    lost_heads, lost_neurons = lost(heads, importance), lost(neurons, importance)
    head, neuron = budget.cost(heads[:1]), budget.cost(neurons[:1])
    choices = []
    for count in range(len(layout.of_kind("heads")), len(heads) + 1):
        others = min(int((budget.left - count * head) // neuron), len(neurons))
        if others < len(layout.of_kind("neurons")):
            break
        choices.append((float(lost_heads[count] + lost_neurons[others]), count, others))
    _, count, others = min(choices)
    return masks([*heads[:count], *neurons[:others]], layout.sites)


def lost(units: Sequence[Unit], importance: Mapping[str, Tensor]) -> Tensor:
    """Summed importance of what is removed where the first n units stay, [units + 1] for n from 0."""
    values = torch.stack([importance[site.name][unit] for site, unit in units])
    return torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)])


def rearranged(fisher: Tensor, unit_mask: Tensor) -> Tensor:
    """Swap a removed unit and a kept one, always the best pair, as long as (1-m)' I (1-m) gets less (section 4.2).

    For a removed i and a kept j, with g = I (1-m), a swap changes it by I_ii - 2 g_i + I_jj + 2 g_j - 2 I_ij.

    Args:
        fisher: I, [units, units] float64.
        unit_mask: m, bool [units].
    """
    unit_mask, own = unit_mask.clone(), fisher.diagonal()
    while unit_mask.any() and not unit_mask.all():
        pull = fisher[:, ~unit_mask].sum(1)
        removed, kept = (~unit_mask).nonzero(), unit_mask.nonzero().squeeze(1)
        change = (own - 2 * pull)[removed] + (own + 2 * pull)[kept] - 2 * fisher[removed, kept]
        best = int(change.argmin())
        if change.flatten()[best] >= -ROUNDING * own.sum():
            break
        unit_mask[removed[best // len(kept)]], unit_mask[kept[best % len(kept)]] = True, False
    return unit_mask
