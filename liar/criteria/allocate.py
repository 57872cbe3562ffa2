"""From scores and a budget to a mask: the best units first, never over the budget, at least one unit per site."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

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
        scope: `"layer"` (every layer keeps equally many, if that comes within 1 % of the budget) or `"global"` (all units
            compete).

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
    fill = _Fill(layout, chosen, spent, budget)
    normal = {name: SCOPES[scope](score) for name, score in scores.items()}
    if scope == "layer":
        fill.by_groups(normal)
    if scope == "global" or fill.spent < budget - 0.01 * layout.parameters:
        fill.one_by_one(normal)
    return Mask(chosen, asked=keep)


@dataclass
class _Fill:
    """Units being added to `chosen` while the budget lasts."""

    layout: Layout
    chosen: dict[str, Tensor]
    spent: int
    budget: int

    def by_groups(self, normal: Mapping[str, Tensor]) -> None:
        """The units of one kind and one rank in all layers together, or none of them: layers stay equally wide."""
        groups: dict[tuple[float, str], list[tuple[Site, int]]] = {}
        for site in self.layout.sites:
            for unit, score in enumerate(normal[site.name].tolist()):
                groups.setdefault((-score, site.kind), []).append((site, unit))
        for group in sorted(groups):
            self._add(groups[group])

    def one_by_one(self, normal: Mapping[str, Tensor]) -> None:
        """The best unit first, wherever it is."""
        units = [(site, unit) for site in self.layout.sites for unit in range(site.units)]
        order = torch.cat([normal[site.name] for site in self.layout.sites]).argsort(descending=True, stable=True)
        for index in order.tolist():
            self._add([units[index]])

    def _add(self, units: list[tuple[Site, int]]) -> None:
        new = [(site, unit) for site, unit in units if not self.chosen[site.name][unit]]
        cost = sum(site.parameters for site, _ in new)
        if self.spent + cost <= self.budget:
            self.spent += cost
            for site, unit in new:
                self.chosen[site.name][unit] = True
