"""What may be kept, and how much of it: checked against the model before any data is looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd

from liar.costs import Costs
from liar.errors import BudgetError, OptionError
from liar.sites import Layout, Site, dropped_note


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
        prices: cost of a unit by site, where any number of them may stay; None where widths come in steps.
    """

    costs: Costs
    keep: float
    groups: tuple[Group, ...]
    protected: tuple[Site, ...]
    prices: Mapping[str, float] | None

    @property
    def limit(self) -> float:
        """What all that is kept may cost."""
        return self.keep * self.costs.dense

    @cached_property
    def least(self) -> Mapping[str, int]:
        """The number of units that a site keeps at least, by its name."""
        return {site.name: min(group.counts) for group in self.groups for site in group.sites}

    @classmethod
    def of(
        cls,
        layout: Layout,
        costs: Costs,
        keep: float,
        *,
        round_to: int = 1,
        possible: Mapping[str, Sequence[int]] | None = None,
        protect: Sequence[str | int] = (),
        drop: bool = False,
    ) -> Budget:
        """Check what is wanted.

        Args:
            layout: the model's sites.
            costs: of these sites.
            keep: share of the cost to keep (see `check_keep`).
            round_to: a site keeps a multiple of so many channels, or all.
            possible: kind -> numbers of units that every layer may keep; widths are then the same in all layers.
            protect: names of sites, and numbers of layers, that stay whole.
            drop: a site may keep nothing, if its costs say what that is like.

        Raises:
            OptionError: `round_to` below 1, or something to protect that is not there.
            BudgetError: the least that is possible costs more; or the costs are those of another model.
        """
        costs.check(layout)
        if round_to < 1:
            raise OptionError(f"round_to={round_to}: expected a number of channels, at least 1")
        protected = _protected(layout, protect)
        allowed = {site.name: _rounded(site, costs, round_to, drop=drop) for site in layout.sites}
        allowed |= {site.name: [site.units] for site in protected}
        groups = _uniform(layout, allowed, possible) if possible else [Group((s,), allowed[s.name]) for s in layout.sites]
        made = cls(costs, keep, tuple(groups), protected, None if round_to > 1 or possible else costs.prices)
        made._check()
        return made

    def _check(self) -> None:
        cheapest = [(min((group.cost(self.costs, count), count) for count in group.counts), group) for group in self.groups]
        least = self.costs.fixed + sum(cost for (cost, _), _ in cheapest)
        if least > self.limit:
            shown = [f"{count} {group.sites[0].kind}" for (_, count), group in cheapest]
            raise BudgetError(
                f"keep={self.keep} cannot be met: the least that is possible is {least / self.costs.dense:.4f} of the "
                f"{self.costs.name}, with {', '.join(shown[:4])}{', …' if len(shown) > 4 else ''} in a layer; ask for at "
                "least that, or for fewer restrictions"
            )


def check_keep(keep: float | None) -> None:
    """Whether that is a share of a budget that may stay.

    Raises:
        OptionError: it is not.
    """
    if keep is None or not 0 < keep <= 1:
        raise OptionError(f"keep={keep!r}: expected the share that stays, above 0 and at most 1")


def _rounded(site: Site, costs: Costs, round_to: int, *, drop: bool) -> list[int]:
    """The numbers of units with which a site has a multiple of so many channels, and its whole number."""
    step = round_to // gcd(round_to, site.consumer.width)
    least = 0 if drop and site.droppable else 1
    return [count for count in sorted(costs.sites[site.name]) if count >= least and (count % step == 0 or count == site.units)]


def _uniform(layout: Layout, allowed: Mapping[str, Sequence[int]], possible: Mapping[str, Sequence[int]]) -> list[Group]:
    """One group per kind."""
    groups = []
    for kind, legal in possible.items():
        sites = layout.of_kind(kind)
        common = set(legal).intersection(*(allowed[site.name] for site in sites))
        if not common:
            raise BudgetError(
                f"uniform: {kind} of different layers ({', '.join(site.name for site in sites)}) can have no number in common "
                "that a stock class could load; begin with the dense model, or leave uniform out"
            )
        groups.append(Group(sites, sorted(common)))
    return groups


def _protected(layout: Layout, names: Sequence[str | int]) -> tuple[Site, ...]:
    """The sites that were named, by their name or by the number of their layer."""
    if isinstance(names, str):
        raise OptionError(f"protect={names!r}: expected a list of names of sites and numbers of layers, got one string")
    known = {key for site in layout.sites for key in (site.name, site.layer)}
    if unknown := [name for name in names if name not in known]:
        raise OptionError(
            f"protect: no such site or layer: {unknown[0]!r}; expected names such as {layout.sites[0].name!r} "
            f"or numbers of layers from 0 to {len(layout.blocks) - 1}{dropped_note(layout)}"
        )
    return tuple(site for site in layout.sites if site.name in names or site.layer in names)
