"""From scores and a budget to a mask: the best units first, never over the budget, at least one unit per site."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from liar.errors import BudgetError, OptionError
from liar.mask import Mask
from liar.sites import Layout, Site

# Share of the parameters that may stay unused; where it is more, a large unit is let in for small ones.
TOLERANCE = 0.01


def _ranks(scores: Tensor) -> Tensor:
    """Share of the site's units that score less: equal shares of all sites stay."""
    return scores.argsort(stable=True).argsort().double() / len(scores)


def _standardised(scores: Tensor) -> Tensor:
    """Deviations from the site's mean (FLAP, section 4.2): sites with a few outstanding units keep fewer."""
    return (scores - scores.mean()) / scores.std(correction=0).clamp_min(torch.finfo(scores.dtype).tiny)


SCOPES: dict[str, Callable[[Tensor], Tensor]] = {"layer": _ranks, "global": _standardised}


def allocate(scores: Mapping[str, Tensor], layout: Layout, keep: float, scope: str) -> Mask:
    """Keep the best units until the share `keep` of all parameters in the blocks is reached.

    Args:
        scores: site name -> [units].
        layout: the model's sites.
        keep: share of the parameters in the model's blocks to keep, in (0, 1].
        scope: `"layer"` (the same share of every site) or `"global"` (all units compete).

    Raises:
        OptionError: `keep` outside (0, 1].
        BudgetError: even with one unit per site more than the share stays.
    """
    if not 0 < keep <= 1:
        raise OptionError(f"keep={keep} is the share of parameters that stays; expected a number in (0, 1]")
    budget = int(keep * layout.parameters)
    sites = layout.sites
    chosen = {site.name: torch.zeros(site.units, dtype=torch.bool) for site in sites}
    for site in sites:
        chosen[site.name][scores[site.name].argmax()] = True
    spent = layout.kept_parameters(dict.fromkeys(chosen, 1))
    if spent > budget:
        raise BudgetError(
            f"keep={keep} cannot be met: with a single unit left in each of {len(sites)} sites "
            f"{spent / layout.parameters:.4f} of the parameters in the blocks stay; ask for at least that"
        )
    normal = torch.cat([SCOPES[scope](scores[site.name]) for site in sites])
    owner = [(site, unit) for site in sites for unit in range(site.units)]
    ranked = [owner[index] for index in normal.argsort(descending=True, stable=True).tolist()]
    for site, unit in ranked:
        if not chosen[site.name][unit] and spent + site.parameters <= budget:
            chosen[site.name][unit] = True
            spent += site.parameters
    for site, unit in ranked:
        if budget - spent <= TOLERANCE * layout.parameters:
            break
        if not chosen[site.name][unit]:
            spent += _exchange(ranked, chosen, site, unit, spent + site.parameters - budget)
    return Mask(chosen, asked=keep)


def _exchange(ranked: list[tuple[Site, int]], chosen: dict[str, Tensor], site: Site, unit: int, missing: int) -> int:
    """Let in a large unit that just did not fit, for the worst small ones; the parameters gained (0 if there is no room)."""
    left, out, freed = {name: int(keep.sum()) for name, keep in chosen.items()}, [], 0
    for other, number in reversed(ranked):
        if freed >= missing:
            break
        if chosen[other.name][number] and other.parameters < site.parameters and left[other.name] > 1:
            out.append((other.name, number))
            left[other.name] -= 1
            freed += other.parameters
    if not missing <= freed < site.parameters:
        return 0
    for name, number in out:
        chosen[name][number] = False
    chosen[site.name][unit] = True
    return site.parameters - freed
