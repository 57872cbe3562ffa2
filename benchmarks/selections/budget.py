"""A share of the block parameters as the rivals' selections spend it: what a unit costs, and the best units that fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from liar.costs import params
from liar.errors import BudgetError
from liar.sites import Site

# Site and number of a unit.
Unit = tuple[Site, int]


@dataclass(frozen=True)
class Budget:
    """What units may cost.

    Attributes:
        prices: parameters of one unit by site.
        left: parameters that all units still to be decided may have together.
    """

    prices: Mapping[str, float]
    left: float

    @classmethod
    def of(cls, model: nn.Module, keep: float) -> Budget:
        """The share `keep` of the block parameters, less what no mask changes.

        Raises:
            BudgetError: not even one unit of every site fits.
        """
        costs = params(model)
        prices = costs.prices
        assert prices is not None, "parameters are the same for all units of a site"
        left = keep * costs.dense - costs.fixed
        if sum(prices.values()) > left:
            least = (costs.fixed + sum(prices.values())) / costs.dense
            raise BudgetError(
                f"one unit in each of {len(prices)} sites is {least:.4f} of the parameters; {keep:.4f} was asked for"
            )
        return cls(prices, left)

    def cost(self, units: Iterable[Unit]) -> float:
        """Of some units together."""
        return sum(self.prices[site.name] for site, _ in units)

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


def ranked(worth: Mapping[str, Tensor], sites: Sequence[Site]) -> list[Unit]:
    """All units of some sites: the best of every site, since one has to stay, and then all others, best first.

    Args:
        worth: site name -> [units].
        sites: whose units compete.
    """
    best = {site.name: int(worth[site.name].argmax()) for site in sites}
    units = [(site, unit) for site in sites for unit in range(site.units)]
    order = torch.cat([worth[site.name] for site in sites]).argsort(descending=True, stable=True).tolist()
    others = (units[index] for index in order)
    return [(site, best[site.name]) for site in sites] + [(site, unit) for site, unit in others if best[site.name] != unit]


def masks(units: Iterable[Unit], sites: Sequence[Site]) -> dict[str, Tensor]:
    """Bool [units] by site name: True for the units of the list."""
    kept = {site.name: torch.zeros(site.units, dtype=torch.bool) for site in sites}
    for site, unit in units:
        kept[site.name][unit] = True
    return kept
