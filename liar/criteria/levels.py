"""A budget shared by an integer program: for widths that come in steps, that are equal in all layers, or that were timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array
from torch import Tensor

from liar.costs import Costs
from liar.errors import BudgetError
from liar.sites import Layout, Site

# How far from the best the answer may be, relative; and the seconds after which the best so far is taken.
GAP, SECONDS = 1e-4, 60


@dataclass(frozen=True)
class Choice:
    """What can be decided at once: how many units some sites keep, each as many as the others.

    Attributes:
        sites: they are of one kind.
        counts: the possible numbers of units, at least one.
        costs: of all the sites together, per count.
        errors: of all the sites together, per count.
    """

    sites: tuple[Site, ...]
    counts: Sequence[int]
    costs: Sequence[float]
    errors: Sequence[float]


def counts(site: Site, costs: Costs, round_to: int) -> list[int]:
    """The numbers of units a site may keep: channels in multiples of `round_to`, or all."""
    step = round_to // gcd(round_to, site.consumer.width)
    return [number for number in sorted(costs.sites[site.name]) if number % step == 0 or number == site.units]


def choices(
    losses: Mapping[str, Tensor], layout: Layout, costs: Costs, possible: Mapping[str, Sequence[int]], *, uniform: bool
) -> list[Choice]:
    """What is to be decided, by site, or if they are to be uniform by kind.

    Args:
        losses: site name -> [units], what removing each unit adds to the error.
        layout: the model's sites.
        costs: of each site by the number of its units.
        possible: site name -> the numbers of units it may keep.
        uniform: all sites of a kind keep equally many.
    """
    errors = {site.name: _errors(losses[site.name]) for site in layout.sites}
    kinds = dict.fromkeys(site.kind for site in layout.sites)
    groups = [layout.of_kind(kind) for kind in kinds] if uniform else [(site,) for site in layout.sites]
    made = []
    for sites in groups:
        common = sorted(set.intersection(*(set(possible[site.name]) for site in sites)))
        if not common:
            raise BudgetError(
                f"uniform: the {sites[0].kind} of different layers ({', '.join(site.name for site in sites)}) can have no "
                "number in common that a stock class could load; begin with the dense model, or leave uniform out"
            )
        spent = [sum(costs.sites[site.name][number] for site in sites) for number in common]
        made.append(Choice(tuple(sites), common, spent, [sum(float(errors[s.name][n]) for s in sites) for n in common]))
    return made


def _errors(losses: Tensor) -> np.ndarray:
    """Error with n units left, [units + 1]: the cheapest others are gone."""
    gone = np.concatenate([[0.0], np.cumsum(np.sort(losses.numpy()))])
    return gone[::-1]


def share(made: Sequence[Choice], costs: Costs, limit: float) -> dict[str, int]:
    """The number of units of every site at which the error is least and the cost not above the limit.

    A multiple-choice knapsack, solved by branch and cut (HiGHS by way of `scipy.optimize.milp`).

    Raises:
        BudgetError: even the cheapest numbers cost more.
    """
    least = costs.fixed + sum(min(choice.costs) for choice in made)
    if least > limit:
        raise BudgetError(
            f"the budget cannot be met: the least these options allow is {least / costs.dense:.4f} of the {costs.name}, "
            f"with {', '.join(_least(choice) for choice in made[:4])}{', …' if len(made) > 4 else ''}; "
            f"{limit / costs.dense:.4f} was asked for"
        )
    owner = np.repeat(np.arange(len(made)), [len(choice.counts) for choice in made])
    spent = np.concatenate([choice.costs for choice in made])
    error = np.concatenate([choice.errors for choice in made])
    one_each = LinearConstraint(coo_array((np.ones(len(owner)), (owner, np.arange(len(owner))))), 1, 1)
    within = LinearConstraint(spent[None] / costs.dense, ub=(limit - costs.fixed) / costs.dense)
    answer = milp(
        error / max(float(np.abs(error).max()), np.finfo(float).tiny),
        constraints=[one_each, within],
        integrality=np.ones(len(owner), dtype=int),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": GAP, "time_limit": SECONDS},
    )
    assert answer.x is not None, answer.message
    starts = np.searchsorted(owner, np.arange(len(made)))
    kept: dict[str, int] = {}
    for choice, start in zip(made, starts, strict=True):
        number = choice.counts[int(answer.x[start : start + len(choice.counts)].argmax())]
        kept |= dict.fromkeys((site.name for site in choice.sites), number)
    return kept


def _least(choice: Choice) -> str:
    number = choice.counts[int(np.argmin(choice.costs))]
    return f"{number} {choice.sites[0].kind}" + ("" if len(choice.sites) > 1 else f" in {choice.sites[0].name}")
