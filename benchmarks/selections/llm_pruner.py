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
from liar.models import Layout, Site

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
    unit_masks = budget.same_share(importance(model, batches), pruned)
    everything = {site.name: torch.ones(site.units, dtype=torch.bool) for site in whole}
    return liar.Mask({site.name: {**everything, **unit_masks}[site.name] for site in layout.sites}, requested=keep)


def pruned_sites(layout: Layout) -> list[Site]:
    """The sites of all blocks but the first and the last ones."""
    count = len(layout.blocks)
    blocks = layout.blocks[round(FIRST * count) : count - round(LAST * count)]
    return [site for site in layout.sites if site.block in blocks]


def importance(model: nn.Module, batches: Sequence[Any]) -> dict[str, Tensor]:
    """Sum of |w dL/dw| by unit, [units] by site: what the library's `snip` sums, with the next tokens as labels."""
    calibration = liar.Calibration.of(batches, model)
    pairs = zip(calibration.batches, calibration.token_masks, strict=True)
    labelled = [{**batch, "labels": batch["input_ids"].masked_fill(~token_mask, -100)} for batch, token_mask in pairs]
    statistics = liar.collect(model, labelled, criteria=["snip"], progress=False)
    return {name: values["weight_gradient"] for name, values in statistics.sites.items()}
