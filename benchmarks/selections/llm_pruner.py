"""LLM-Pruner's selection (Ma et al. 2023, arXiv 2305.11627): first-order importance of weights, the same share of each layer.

Importance of a unit is the sum over all its weights of |w dL/dw| (element-wise, `param_first` in the authors' code), L the
next-token loss of a few texts. Blocks near the input and the output stay whole: their scripts for 32 blocks prune 4 to 29.

Differences: the batches of the grid are read, not ten sequences of BookCorpus; heads that share keys and values go together;
the share of what is pruned is chosen so that the whole model keeps what is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import liar
from benchmarks.selections.budget import Budget
from benchmarks.selections.gradients import frozen_copy
from liar.models import Layout, Site, layer_of
from liar.runtime import preserve_model_state

# Of 32 blocks, the share that stays whole at the beginning and at the end.
FIRST, LAST = 4 / 32, 2 / 32


def select(model: nn.Module, batches: Sequence[Any], keep: float, seed: int) -> liar.Mask:
    """Nothing is random.

    Raises:
        BudgetError: the blocks that stay whole have more than the budget.
    """
    layout, budget = liar.discover(model), Budget.of(model, keep)
    pruned = pruned_sites(layout)
    whole = [site for site in layout.sites if site not in pruned]
    budget = budget.without([(site, unit) for site in whole for unit in range(site.units)])
    unit_masks = budget.same_share(importance(model, layout, batches), pruned)
    everything = {site.name: torch.ones(site.units, dtype=torch.bool) for site in whole}
    return liar.Mask({site.name: {**everything, **unit_masks}[site.name] for site in layout.sites}, requested=keep)


def pruned_sites(layout: Layout) -> list[Site]:
    """The sites of all blocks but the first and the last ones."""
    count = len(layout.blocks)
    blocks = layout.blocks[round(FIRST * count) : count - round(LAST * count)]
    return [site for site in layout.sites if site.block in blocks]


def importance(model: nn.Module, layout: Layout, batches: Sequence[Any]) -> dict[str, Tensor]:
    """Sum of |w dL/dw| by unit, [units] by site: L is summed over tokens, its gradient over batches."""
    calibration, copied = liar.Calibration.of(batches, model), frozen_copy(model)
    layers = {site.name: [layer_of(copied.get_submodule(site.block), edge) for edge in site.edges] for site in layout.sites}
    weights = [layer.weight for group in layers.values() for layer in group]
    for weight in weights:
        weight.requires_grad_(True)
    totals = [torch.zeros_like(weight) for weight in weights]
    with preserve_model_state(copied), torch.enable_grad():
        for batch, token_mask in zip(calibration.batches, calibration.token_masks, strict=True):
            labels = batch["input_ids"].masked_fill(~token_mask, -100)
            loss = copied(**batch, labels=labels).loss * (labels[:, 1:] != -100).sum()
            for total, gradient in zip(totals, torch.autograd.grad(loss, weights), strict=True):
                total += gradient
    products = iter([(weight.detach() * total).abs() for weight, total in zip(weights, totals, strict=True)])
    found = {}
    for site in layout.sites:
        by_unit = torch.zeros(site.units, dtype=torch.float64)
        for layer, edge in zip(layers[site.name], site.edges, strict=True):
            matrix = layer.as_matrix(next(products)).double().cpu()
            rows = matrix.T if edge.axis == "out" else matrix
            by_unit += rows[edge.by_unit(site.units)].sum((1, 2))
        found[site.name] = by_unit
    return found
