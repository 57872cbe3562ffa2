"""From scores and a budget to a mask: the best units first, never over the budget, at least one unit per site."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor

from liar.errors import BudgetError, OptionError
from liar.mask import Mask
from liar.sites import Layout, Site

# Share of the parameters that may stay unused; where it is more, a large unit is let in for small ones.
TOLERANCE = 0.01

Units = list[tuple[Site, int]]


def _ranks(scores: Tensor) -> Tensor:
    """Share of the site's units that score less: equal shares of all sites stay."""
    return scores.argsort(stable=True).argsort().double() / len(scores)


def _standardised(scores: Tensor) -> Tensor:
    """Deviations from the site's mean (FLAP, section 4.2): sites with a few outstanding units keep fewer."""
    return (scores - scores.mean()) / scores.std(correction=0).clamp_min(torch.finfo(scores.dtype).tiny)


SCOPES: dict[str, Callable[[Tensor], Tensor]] = {"layer": _ranks, "global": _standardised}


def allocate(scores: Mapping[str, Tensor], layout: Layout, keep: float, scope: str, *, comparable: bool = False) -> Mask:
    """Keep the best units until the share `keep` of all parameters in the blocks is reached.

    Args:
        scores: site name -> [units].
        layout: the model's sites.
        keep: share of the parameters in the model's blocks to keep, in (0, 1].
        scope: `"layer"` (every layer keeps equally many, if that comes within 1 % of the budget) or `"global"` (all units
            compete).
        comparable: scores of all sites are in one unit and compete as they are.

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
    normal = {name: score if comparable else SCOPES[scope](score) for name, score in scores.items()}
    if scope == "layer":
        fill.take(_in_all_layers(normal, layout))
    if scope == "global" or fill.unused:
        fill.take(_one_by_one(normal, layout))
    return Mask(chosen, asked=keep)


def _in_all_layers(normal: Mapping[str, Tensor], layout: Layout) -> list[Units]:
    """The units of one kind and one rank in all layers together, best first on average: layers stay equally wide."""
    groups: dict[tuple[str, int], Units] = {}
    for site in layout.sites:
        order = normal[site.name].argsort(descending=True, stable=True)
        for rank, unit in enumerate(order.tolist()):
            groups.setdefault((site.kind, rank), []).append((site, unit))

    def worth(key: tuple[str, int]) -> float:
        return mean(float(normal[site.name][unit]) for site, unit in groups[key])

    return [groups[key] for key in sorted(groups, key=lambda key: (-worth(key), key))]


def _one_by_one(normal: Mapping[str, Tensor], layout: Layout) -> list[Units]:
    """Every unit for itself, best first, wherever it is."""
    units = [(site, unit) for site in layout.sites for unit in range(site.units)]
    order = torch.cat([normal[site.name] for site in layout.sites]).argsort(descending=True, stable=True)
    return [[units[index]] for index in order.tolist()]


@dataclass
class _Fill:
    """Units being added to `chosen` while the budget lasts."""

    layout: Layout
    chosen: dict[str, Tensor]
    spent: int
    budget: int

    @property
    def unused(self) -> bool:
        """Whether more of the budget is left than is tolerable."""
        return self.budget - self.spent > TOLERANCE * self.layout.parameters

    def take(self, groups: Sequence[Units]) -> None:
        """Add whole groups, best first, while they fit; then large ones that just did not fit, in exchange for small ones."""
        for group in groups:
            if self.spent + self._cost(group) <= self.budget:
                self._set(group, True)
        for group in groups:
            if not self.unused:
                return
            self._exchange(group, groups)

    def _exchange(self, group: Units, groups: Sequence[Units]) -> None:
        """Let a group in for the worst cheaper ones, if something is gained and every site keeps a unit."""
        cost, freed, out = self._cost(group), 0, list[Units]()
        left = {name: int(keep.sum()) for name, keep in self.chosen.items()}
        for other in reversed(groups):
            price = sum(site.parameters for site, _ in other)
            if self.spent + cost - freed <= self.budget:
                break
            if price < cost and all(self.chosen[site.name][unit] and left[site.name] > 1 for site, unit in other):
                out.append(other)
                freed += price
                for site, _ in other:
                    left[site.name] -= 1
        if freed < cost and self.spent + cost - freed <= self.budget:
            for other in out:
                self._set(other, False)
            self._set(group, True)

    def _cost(self, group: Units) -> int:
        return sum(site.parameters for site, unit in group if not self.chosen[site.name][unit])

    def _set(self, group: Units, keep: bool) -> None:
        for site, unit in group:
            self.spent += site.parameters * (keep - int(self.chosen[site.name][unit]))
            self.chosen[site.name][unit] = keep
