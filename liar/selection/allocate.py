"""From scores and a budget to a mask: never over the budget, and no site keeps less than it must."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from liar.mask import Mask
from liar.models import Layout
from liar.selection.budget.budget import Budget
from liar.selection.budget.greedy import allocate_greedy
from liar.selection.budget.milp import allocate_milp


def _ranks(scores: Tensor) -> Tensor:
    """Share of the site's units that score less: equal shares of all sites stay."""
    return scores.argsort(stable=True).argsort().double() / len(scores)


def _standardised(scores: Tensor) -> Tensor:
    """Deviations from the site's mean (FLAP, section 4.2): sites with a few outstanding units keep fewer."""
    return (scores - scores.mean()) / scores.std(correction=0).clamp_min(torch.finfo(scores.dtype).tiny)


# How scores of different sites are compared, by the option `widths`.
COMPARED: dict[str, Callable[[Tensor], Tensor]] = {"free": _standardised, "balanced": _ranks, "uniform": _standardised}


def allocate(scores: Mapping[str, Tensor], layout: Layout, budget: Budget, widths: str, *, comparable: bool = False) -> Mask:
    """Keep the best units until the budget is reached: first how many of every site, then which ones.

    Args:
        scores: site name -> [units].
        layout: the model's sites.
        budget: what may stay.
        widths: `"free"`: all units compete; `"balanced"`: every layer keeps equally many, if that comes within 1 % of the
            budget; `"uniform"`: the budget has one group per kind.
        comparable: scores of all sites are in one unit, per parameter, and compete as they are; not where widths in steps are
            to be balanced.
    """
    if budget.limit >= budget.costs.dense:
        return Mask({site.name: torch.ones(site.units, dtype=torch.bool) for site in layout.sites})
    # The integer program knows no balance: there, only ranks make every layer keep the same share.
    as_they_are = comparable and (widths != "balanced" or budget.unit_costs is not None)
    compared = {name: score if as_they_are else COMPARED[widths](score) for name, score in scores.items()}
    if budget.unit_costs is not None:
        if comparable:
            compared = {s.name: compared[s.name] * s.parameters / budget.unit_costs[s.name] for s in layout.sites}
        counts = allocate_greedy(compared, layout, budget, balanced=widths == "balanced")
    else:
        # What is lost with a unit: scores are per parameter, and some are below 0.
        losses = {s.name: (compared[s.name] - compared[s.name].min().clamp_max(0)) * s.parameters for s in layout.sites}
        counts = allocate_milp(losses, budget)
    return Mask({name: _best(compared[name], count) for name, count in counts.items()})


def _best(scores: Tensor, count: int) -> Tensor:
    """The units to keep if there are so many, bool [units]."""
    best = scores.argsort(descending=True, stable=True)[:count]
    return torch.zeros(len(scores), dtype=torch.bool).index_fill_(0, best, True)
