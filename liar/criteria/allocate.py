"""From scores and a budget to a mask: never over the budget, at least one unit per site."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from liar.costs import Costs
from liar.criteria.fill import fill
from liar.criteria.levels import choices, counts, share
from liar.errors import OptionError
from liar.mask import Mask
from liar.sites import Layout, Site


def _ranks(scores: Tensor) -> Tensor:
    """Share of the site's units that score less: equal shares of all sites stay."""
    return scores.argsort(stable=True).argsort().double() / len(scores)


def _standardised(scores: Tensor) -> Tensor:
    """Deviations from the site's mean (FLAP, section 4.2): sites with a few outstanding units keep fewer."""
    return (scores - scores.mean()) / scores.std(correction=0).clamp_min(torch.finfo(scores.dtype).tiny)


SCOPES: dict[str, Callable[[Tensor], Tensor]] = {"layer": _ranks, "global": _standardised}


def allocate(
    scores: Mapping[str, Tensor],
    layout: Layout,
    costs: Costs,
    keep: float,
    scope: str,
    *,
    comparable: bool = False,
    round_to: int = 1,
    possible: Mapping[str, Sequence[int]] | None = None,
    protect: Sequence[str | int] = (),
) -> Mask:
    """Keep the best units until the share `keep` of the cost is reached.

    Args:
        scores: site name -> [units].
        layout: the model's sites.
        costs: of the sites.
        keep: share of the cost to keep, in (0, 1].
        scope: `"layer"` (every layer keeps equally many, if that comes within 1 % of the budget) or `"global"` (all units
            compete).
        comparable: scores of all sites are in one unit, per parameter, and compete as they are.
        round_to: a site keeps a multiple of so many channels, or all.
        possible: kind -> numbers of units that every layer may keep; widths are then the same in all layers.
        protect: names of sites, and numbers of layers, that stay whole.

    Raises:
        OptionError: `keep` outside (0, 1], `round_to` below 1, or something to protect that is not there.
        BudgetError: the least that is possible is more than the share.
    """
    if not 0 < keep <= 1:
        raise OptionError(f"keep={keep} is the share of {costs.name} that stays; expected a number in (0, 1]")
    if round_to < 1:
        raise OptionError(f"round_to={round_to}: expected a number of channels, at least 1")
    protected = _protected(layout, protect)
    limit = keep * costs.dense
    normal = {name: score if comparable else SCOPES[scope](score) for name, score in scores.items()}
    if costs.prices is not None and round_to == 1 and possible is None:
        if comparable:
            normal = {s.name: normal[s.name] * s.parameters / costs.prices[s.name] for s in layout.sites}
        return Mask(fill(normal, layout, costs, limit, protected=protected, level=scope == "layer"))
    allowed = {site.name: counts(site, costs, round_to) for site in layout.sites}
    allowed |= {site.name: [site.units] for site in protected}
    if possible is not None:
        allowed = {s.name: [n for n in allowed[s.name] if n in set(possible[s.kind])] for s in layout.sites}
    # What is lost with a unit: scores are per parameter, and cannot be negative.
    losses = {s.name: (normal[s.name] - min(0.0, float(normal[s.name].min()))) * s.parameters for s in layout.sites}
    kept = share(choices(losses, layout, costs, allowed, uniform=possible is not None), costs, limit)
    return Mask({name: _best(scores[name], number) for name, number in kept.items()})


def _best(scores: Tensor, number: int) -> Tensor:
    """The units with the highest scores, bool [units]."""
    best = scores.argsort(descending=True, stable=True)[:number]
    return torch.zeros(len(scores), dtype=torch.bool).index_fill_(0, best, True)


def _protected(layout: Layout, names: Sequence[str | int]) -> list[Site]:
    """The sites that were named, by their name or by the number of their layer."""
    if isinstance(names, str):
        raise OptionError(f"protect={names!r}: expected a list of names of sites and numbers of layers, got one string")
    known = {key for site in layout.sites for key in (site.name, site.layer)}
    if unknown := [name for name in names if name not in known]:
        layers = max(site.layer for site in layout.sites)
        raise OptionError(
            f"protect: no such site or layer: {unknown[0]!r}; expected names such as {layout.sites[0].name!r} "
            f"or numbers of layers from 0 to {layers}"
        )
    return [site for site in layout.sites if site.name in names or site.layer in names]
