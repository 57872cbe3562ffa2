"""From scores and a budget to a mask: never over the budget, and no site keeps less than it must."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from liar.criteria.budget import Budget
from liar.criteria.fill import fill
from liar.criteria.levels import share
from liar.criteria.scores import CRITERIA
from liar.errors import OptionError
from liar.mask import Mask
from liar.sites import Layout


def _ranks(scores: Tensor) -> Tensor:
    """Share of the site's units that score less: equal shares of all sites stay."""
    return scores.argsort(stable=True).argsort().double() / len(scores)


def _standardised(scores: Tensor) -> Tensor:
    """Deviations from the site's mean (FLAP, section 4.2): sites with a few outstanding units keep fewer."""
    return (scores - scores.mean()) / scores.std(correction=0).clamp_min(torch.finfo(scores.dtype).tiny)


SCOPES: dict[str, Callable[[Tensor], Tensor]] = {"layer": _ranks, "global": _standardised}


def check_drop(criterion: str, scope: str, *, uniform: bool) -> None:
    """Whether whole sub-layers may be dropped with these options.

    Raises:
        OptionError: they may not.
    """
    if uniform:
        raise OptionError("drop and uniform: a sub-layer that goes leaves layers of different widths; choose one of the two")
    able = [name for name, each in CRITERIA.items() if each.comparable]
    if criterion not in able or scope != "global":
        raise OptionError(
            f"drop with criterion={criterion!r}, scope={scope!r}: expected scope='global' and one of {', '.join(able)}; others "
            "rank the units of a site among themselves, and cannot say that none of them is worth its cost"
        )


def allocate(
    scores: Mapping[str, Tensor],
    layout: Layout,
    budget: Budget,
    scope: str,
    *,
    sets: Mapping[str, Tensor],
    comparable: bool = False,
) -> Mask:
    """Keep the best units until the budget is reached: first how many of every site, then which ones.

    Args:
        scores: site name -> [units].
        layout: the model's sites.
        budget: what may stay.
        scope: `"layer"` (every layer keeps equally many, if that comes within 1 % of the budget) or `"global"` (all units
            compete).
        sets: site name -> the best units by their number, bool [units + 1, units]; a site that is not there keeps those that
            score most.
        comparable: scores of all sites are in one unit, per parameter, and compete as they are.
    """
    worth = {name: score if comparable else SCOPES[scope](score) for name, score in scores.items()}
    if budget.prices is not None:
        if comparable:
            worth = {s.name: worth[s.name] * s.parameters / budget.prices[s.name] for s in layout.sites}
        counts = fill(worth, layout, budget, level=scope == "layer")
    else:
        # What is lost with a unit: scores are per parameter, and some are below 0.
        losses = {s.name: (worth[s.name] - worth[s.name].min().clamp_max(0)) * s.parameters for s in layout.sites}
        counts = share(losses, budget)
    return Mask({name: _best(worth[name], count, sets.get(name)) for name, count in counts.items()})


def _best(scores: Tensor, count: int, sets: Tensor | None) -> Tensor:
    """The units to keep if there are so many, bool [units]."""
    if sets is not None and len(sets):
        return sets[count]
    best = scores.argsort(descending=True, stable=True)[:count]
    return torch.zeros(len(scores), dtype=torch.bool).index_fill_(0, best, True)
