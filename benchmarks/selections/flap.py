"""FLAP's selection (An et al. 2024, arXiv 2312.11983): fluctuation, standardised in every layer, one threshold for all of them.

A channel's score is the variance of what the consumer reads there, times the squared norm of the weights that read it (WIFV);
those of attention are squared, as in the authors' code. Scores are standardised over the channels of a layer, and a head has
the mean of its channels. The best units of all layers together stay, a head counting as many parameters as it has (in the
authors' code as much as 170 neurons, whatever the model).

Differences: one unit of every site has to stay, where theirs may drop a whole sublayer; heads that share keys and values go
together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

import liar
from benchmarks.selections.budget import Budget, masks, ranked
from liar.selection import SiteWeights


def select(model: nn.Module, batches: Sequence[Any], keep: float, seed: int) -> liar.Mask:
    """Nothing is random."""
    layout, budget = liar.discover(model), Budget.of(model, keep)
    statistics = liar.collect(model, batches, criteria=["fluctuation"], progress=False)
    scores = {
        site.name: standardised(SiteWeights.of(model.get_submodule(site.block), site, statistics.sites[site.name]), site.kind)
        for site in layout.sites
    }
    return liar.Mask(masks(budget.prefix(ranked(scores, layout.sites)), layout.sites), requested=keep)


def standardised(weights: SiteWeights, kind: str) -> Tensor:
    """[units]: means over their channels of WIFV, which has mean 0 and variance 1 in the layer."""
    metric = weights.consumer.square().sum(2) * weights.per_channel(weights.statistics["variance"]).to(weights.consumer)
    metric = metric.square() if kind == "heads" else metric
    return ((metric - metric.mean()) / metric.std()).mean(1).cpu()
