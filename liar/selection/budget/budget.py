"""How much may be kept, and in which widths: checked against the model before any data is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd

from liar.errors import BudgetError, OptionError
from liar.models import Layout, Site
from liar.options import SelectOptions
from liar.selection.budget.costs import Costs


@dataclass(frozen=True)
class Group:
    """Sites that keep equally many units: one site, or if widths are uniform all of a kind.

    Attributes:
        sites: of one kind.
        counts: the numbers of units that each of them may keep, from the least.
    """

    sites: tuple[Site, ...]
    counts: Sequence[int]

    def cost(self, costs: Costs, count: int) -> float:
        """Of all the sites together."""
        return sum(costs.sites[site.name][count] for site in self.sites)


@dataclass(frozen=True)
class Budget:
    """A share of a cost, and the widths that are allowed.

    Attributes:
        costs: of the sites by their widths.
        keep: share of the cost of the dense model that may stay.
        groups: all sites, each in one group.
        protected: sites that stay whole.
        unit_costs: cost of a unit by site, where any number of them may stay; None where widths come in steps.
    """

    costs: Costs
    keep: float
    groups: tuple[Group, ...]
    protected: tuple[Site, ...]
    unit_costs: Mapping[str, float] | None

    @property
    def limit(self) -> float:
        """What all that is kept may cost."""
        return self.keep * self.costs.dense

    @cached_property
    def min_units(self) -> Mapping[str, int]:
        """The number of units that a site keeps at least, by its name."""
        return {site.name: min(group.counts) for group in self.groups for site in group.sites}

    @classmethod
    def of(
        cls, layout: Layout, costs: Costs, options: SelectOptions, *, possible: Mapping[str, Sequence[int]] | None = None
    ) -> Budget:
        """Check what was requested.

        Args:
            layout: the model's sites.
            costs: of these sites.
            options: the share to keep, `round_to` and `protect`.
            possible: kind -> numbers of units that every layer may keep; widths are then the same in all layers.

        Raises:
            OptionError: something to protect that is not there.
            BudgetError: the least that is possible costs more; or the costs are those of another model.
        """
        costs.check(layout)
        protected = _protected(layout, list(options.protect))
        allowed = {site.name: _rounded(site, costs, options.round_to) for site in layout.sites}
        allowed |= {site.name: [site.units] for site in protected}
        groups = _uniform(layout, allowed, possible) if possible else [Group((s,), allowed[s.name]) for s in layout.sites]
        unit_costs = None if options.round_to > 1 or possible else costs.unit_costs
        budget = cls(costs, options.keep, tuple(groups), protected, unit_costs)
        budget._check()
        return budget

    def _check(self) -> None:
        cheapest = [(min((group.cost(self.costs, count), count) for count in group.counts), group) for group in self.groups]
        minimum = self.costs.fixed + sum(cost for (cost, _), _ in cheapest)
        if minimum > self.limit:
            shown = list(dict.fromkeys(f"{count} {group.sites[0].kind}" for (_, count), group in cheapest))
            raise BudgetError(
                f"keep={self.keep} cannot be met: the least that is possible is {minimum / self.costs.dense:.4f} of the "
                f"{self.costs.name}, with {', '.join(shown[:4])}{', …' if len(shown) > 4 else ''} in a layer; ask for at "
                f"least that, or for fewer restrictions (round_to, protect, widths){self._whole()}"
            )

    def _whole(self) -> str:
        """A remark where the share that cannot be met is of blocks that mostly are not cut."""
        part = self.costs.fixed / self.costs.dense
        return f"; {part:.0%} are in layers that are never cut, such as experts (Layout.uncovered)" if part > 0.5 else ""


def _rounded(site: Site, costs: Costs, round_to: int) -> list[int]:
    """The numbers of units with which a site has a multiple of so many channels, and its whole number."""
    step = round_to // gcd(round_to, site.consumer.width)
    return [count for count in sorted(costs.sites[site.name]) if count >= 1 and (count % step == 0 or count == site.units)]


def _uniform(layout: Layout, allowed: Mapping[str, Sequence[int]], possible: Mapping[str, Sequence[int]]) -> list[Group]:
    """One group per kind."""
    groups = []
    for kind, legal in possible.items():
        sites = layout.of_kind(kind)
        common = set(legal).intersection(*(allowed[site.name] for site in sites))
        if not common:
            names = ", ".join(site.name for site in sites)
            raise BudgetError(
                f"widths='uniform': {kind} of different layers ({names}) can have no number in common that a stock class could "
                "load; begin with the dense model, or choose other widths"
            )
        groups.append(Group(sites, sorted(common)))
    return groups


def _protected(layout: Layout, names: Sequence[str | int]) -> tuple[Site, ...]:
    """The sites that were named, by their name or by the number of their layer."""
    names_and_layers = {key for site in layout.sites for key in (site.name, site.layer)}
    if unknown := [name for name in names if name not in names_and_layers]:
        raise OptionError(
            f"protect: no such site or layer: {unknown[0]!r}; expected names such as {layout.sites[0].name!r} "
            f"or numbers of layers from 0 to {len(layout.blocks) - 1}"
        )
    return tuple(site for site in layout.sites if site.name in names or site.layer in names)
