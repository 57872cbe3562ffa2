"""OSSCAR's selection (Meng et al. 2024, arXiv 2403.12983): what the layer's output loses least, the same share of each layer.

min over masks S of min_V |X W - X_S V|^2, by removing one unit after the other with an exact update of the inverse.

Differences: inputs are the dense model's for all layers, where theirs are those of the model that is pruned so far; the local
search by which they swap units afterwards is left out, since it lowers this error by at most 0.6 % (`results/swaps.jsonl`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import liar
from benchmarks.selections.budget import Budget
from benchmarks.selections.inputs import inputs_of


def select(model: nn.Module, batches: Sequence[Any], keep: float, seed: int) -> liar.Mask:
    """Nothing is random."""
    layout, inputs = liar.discover(model), inputs_of(model, batches)
    scores = {}
    for site in layout.sites:
        order = inputs[site.name].order(site.units)
        scores[site.name] = torch.empty(site.units).index_copy_(0, order, torch.arange(site.units, dtype=torch.float32))
    unit_masks = Budget.of(model, keep).same_share(scores, layout.sites)
    return liar.Mask({site.name: unit_masks[site.name] for site in layout.sites}, requested=keep)
