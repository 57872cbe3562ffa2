"""A share of the block parameters as the published methods spend it: what a unit costs, and the best units that fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from liar.errors import BudgetError
from liar.models import Site
from liar.selection import params

# Site and number of a unit.
Unit = tuple[Site, int]


@dataclass(frozen=True)
class Budget:
    """What units may cost.

    Attributes:
        unit_costs: parameters of one unit by site.
        left: parameters that all units still to be decided may have together.
    """

    unit_costs: Mapping[str, float]
    left: float

    @classmethod
    def of(cls, model: nn.Module, keep: float) -> Budget:
        """The share `keep` of the block parameters, less what no mask changes.

        Raises:
            BudgetError: not even one unit of every site fits.
        """
        costs = params(model)
        unit_costs = costs.unit_costs
        assert unit_costs is not None, "parameters are the same for all units of a site"
        left = keep * costs.dense - costs.fixed
        if sum(unit_costs.values()) > left:
            minimum = (costs.fixed + sum(unit_costs.values())) / costs.dense
            raise BudgetError(
                f"one unit in each of {len(unit_costs)} sites is {minimum:.4f} of the parameters; {keep:.4f} was requested"
            )
        return cls(unit_costs, left)

    def cost(self, units: Iterable[Unit]) -> float:
        """Of some units together."""
        return sum(self.unit_costs[site.name] for site, _ in units)

    def without(self, units: Iterable[Unit]) -> Budget:
        """What is left for the others once these units have been taken."""
        return replace(self, left=self.left - self.cost(units))

    def prefix(self, units: Sequence[Unit]) -> Sequence[Unit]:
        """The longest beginning of a list of units that can be paid."""
        spent = 0.0
        for number, unit in enumerate(units):
            spent += self.cost([unit])
            if spent > self.left:
                return units[:number]
        return units

    def same_share(self, scores: Mapping[str, Tensor], sites: Sequence[Site]) -> dict[str, Tensor]:
        """Every site keeps its best units, as many of them as make the same share of each: bool [units] by site.

        Heads are rounded to the nearest number, and neurons get what is left.

        Args:
            scores: site name -> [units].
            sites: all that share what is left of the budget.
        """
        share = self.left / sum(self.unit_costs[site.name] * site.units for site in sites)
        heads, neurons = ([site for site in sites if site.kind == kind] for kind in ("heads", "neurons"))
        kept = best_units(scores, heads, min(share, 1))
        left = self.left - sum(self.unit_costs[name] * int(mask.sum()) for name, mask in kept.items())
        costs = sum(self.unit_costs[site.name] * site.units for site in neurons)
        return {**kept, **best_units(scores, neurons, min(left / costs, 1) if costs else 1, round_down=True)}


def best_units(
    scores: Mapping[str, Tensor], sites: Sequence[Site], share: float, *, round_down: bool = False
) -> dict[str, Tensor]:
    """The best units of each site, such a share of them and one at least: bool [units] by site."""
    kept = {}
    for site in sites:
        count = max(int(share * site.units + (0 if round_down else 0.5)), 1)
        kept[site.name] = torch.zeros(site.units, dtype=torch.bool)
        kept[site.name][scores[site.name].cpu().topk(count).indices] = True
    return kept


def ranked(scores: Mapping[str, Tensor], sites: Sequence[Site]) -> list[Unit]:
    """All units of some sites: the best of every site, since one has to stay, and then all others, best first.

    Args:
        scores: site name -> [units].
        sites: whose units compete.
    """
    best = {site.name: int(scores[site.name].argmax()) for site in sites}
    units = [(site, unit) for site in sites for unit in range(site.units)]
    order = torch.cat([scores[site.name] for site in sites]).argsort(descending=True, stable=True).tolist()
    others = (units[index] for index in order)
    return [(site, best[site.name]) for site in sites] + [(site, unit) for site, unit in others if best[site.name] != unit]


def masks(units: Iterable[Unit], sites: Sequence[Site]) -> dict[str, Tensor]:
    """Bool [units] by site name: True for the units of the list."""
    kept = {site.name: torch.zeros(site.units, dtype=torch.bool) for site in sites}
    for site, unit in units:
        kept[site.name][unit] = True
    return kept
