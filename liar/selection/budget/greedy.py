"""A budget allocated unit by unit, best first: for costs that are the same for every unit of a site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor

from liar.models import Layout, Site
from liar.selection.budget.budget import Budget

# Share of the cost that may stay unused; where it is more, a large unit is let in for small ones.
TOLERANCE = 0.01

UnitGroup = list[tuple[Site, int]]


def allocate_greedy(scores: Mapping[str, Tensor], layout: Layout, budget: Budget, *, balanced: bool) -> dict[str, int]:
    """How many units to keep by site: the best ones until the budget is reached, in each site those it must keep.

    Args:
        scores: site name -> [units].
        layout: the model's sites.
        budget: one with `unit_costs`.
        balanced: every layer keeps equally many, if that comes within `TOLERANCE` of the budget.
    """
    costs = budget.costs
    assert budget.unit_costs is not None, "a budget with steps is allocated by `allocate_milp`"
    free = [site for site in layout.sites if site not in budget.protected]
    chosen = {site.name: torch.full([site.units], site not in free) for site in layout.sites}
    for site in free:
        chosen[site.name][scores[site.name].topk(budget.min_units[site.name]).indices] = True
    spent = costs.of({name: int(kept.sum()) for name, kept in chosen.items()})
    filling = _Fill(budget, budget.unit_costs, chosen, spent)
    if balanced:
        filling.take(_in_all_layers(scores, free))
    if not balanced or filling.unused:
        filling.take(_one_by_one(scores, free))
    return {name: int(kept.sum()) for name, kept in chosen.items()}


def _in_all_layers(scores: Mapping[str, Tensor], sites: Sequence[Site]) -> list[UnitGroup]:
    """The units of one kind and one rank in all layers together, best first on average: layers stay equally wide."""
    groups: dict[tuple[str, int], UnitGroup] = {}
    for site in sites:
        order = scores[site.name].argsort(descending=True, stable=True)
        for rank, unit in enumerate(order.tolist()):
            groups.setdefault((site.kind, rank), []).append((site, unit))

    def average(key: tuple[str, int]) -> float:
        return mean(float(scores[site.name][unit]) for site, unit in groups[key])

    return [groups[key] for key in sorted(groups, key=lambda key: (-average(key), key))]


def _one_by_one(scores: Mapping[str, Tensor], sites: Sequence[Site]) -> list[UnitGroup]:
    """Every unit for itself, best first, wherever it is."""
    units = [(site, unit) for site in sites for unit in range(site.units)]
    order = torch.cat([scores[site.name] for site in sites]).argsort(descending=True, stable=True)
    return [[units[index]] for index in order.tolist()]


@dataclass
class _Fill:
    """Units being added to `chosen` while the budget lasts."""

    budget: Budget
    unit_costs: Mapping[str, float]
    chosen: dict[str, Tensor]
    spent: float

    @property
    def unused(self) -> bool:
        """Whether more of the budget is left than is tolerable."""
        return self.budget.limit - self.spent > TOLERANCE * self.budget.costs.dense

    def take(self, groups: Sequence[UnitGroup]) -> None:
        """Add whole groups, best first, while they fit; then large ones that just did not fit, in exchange for small ones."""
        for group in groups:
            if self.spent + self._cost(group) <= self.budget.limit:
                self._set(group, True)
        for group in groups:
            if not self.unused:
                return
            self._exchange(group, groups)

    def _exchange(self, group: UnitGroup, groups: Sequence[UnitGroup]) -> None:
        """Let a group in for the worst cheaper ones, if something is gained and every site keeps what it must."""
        cost, freed, out = self._cost(group), 0.0, list[UnitGroup]()
        left = {name: int(kept.sum()) for name, kept in self.chosen.items()}
        for other in reversed(groups):
            group_cost = sum(self.unit_costs[site.name] for site, _ in other)
            if self.spent + cost - freed <= self.budget.limit:
                break
            if group_cost < cost and all(
                self.chosen[site.name][unit] and left[site.name] > self.budget.min_units[site.name] for site, unit in other
            ):
                out.append(other)
                freed += group_cost
                for site, _ in other:
                    left[site.name] -= 1
        if freed < cost and self.spent + cost - freed <= self.budget.limit:
            for other in out:
                self._set(other, False)
            self._set(group, True)

    def _cost(self, group: UnitGroup) -> float:
        return sum(self.unit_costs[site.name] for site, unit in group if not self.chosen[site.name][unit])

    def _set(self, group: UnitGroup, kept: bool) -> None:
        for site, unit in group:
            self.spent += self.unit_costs[site.name] * (kept - int(self.chosen[site.name][unit]))
            self.chosen[site.name][unit] = kept
