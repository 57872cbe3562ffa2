"""A budget allocated by an integer program: for widths in steps, equal in all layers, or with measured times."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array
from torch import Tensor

from liar.errors import BudgetError
from liar.selection.budget.budget import Budget

# How far from the best the answer may be, relative; and the seconds after which the best so far is taken.
GAP, SECONDS = 1e-4, 60


def allocate_milp(losses: Mapping[str, Tensor], budget: Budget) -> dict[str, int]:
    """The number of units of every site at which the error is least and the cost within the budget.

    A multiple-choice knapsack, solved by branch and cut (HiGHS by way of `scipy.optimize.milp`).

    Args:
        losses: site name -> [units], at least 0: what removing each unit adds to the error.
        budget: with an allowed width, or several, for every site.
    """
    groups, costs = budget.groups, budget.costs
    left = {name: _left(loss) for name, loss in losses.items()}
    owner = np.repeat(np.arange(len(groups)), [len(group.counts) for group in groups])
    spent = np.array([group.cost(costs, count) for group in groups for count in group.counts])
    error = np.array([sum(left[site.name][count] for site in group.sites) for group in groups for count in group.counts])
    one_each = LinearConstraint(coo_array((np.ones(len(owner)), (owner, np.arange(len(owner))))), 1, 1)
    within = LinearConstraint(spent[None] / costs.dense, ub=(budget.limit - costs.fixed) / costs.dense)
    answer = milp(
        error / max(float(error.max()), np.finfo(float).tiny),
        constraints=[one_each, within],
        integrality=np.ones(len(owner), dtype=int),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": GAP, "time_limit": SECONDS},
    )
    if answer.x is None:
        raise BudgetError(f"no numbers of units were found that meet the budget in {SECONDS} s: {answer.message}")
    kept: dict[str, int] = {}
    for number, group in enumerate(groups):
        count = group.counts[int(answer.x[owner == number].argmax())]
        kept |= dict.fromkeys((site.name for site in group.sites), count)
    return kept


def _left(losses: Tensor) -> NDArray[np.float64]:
    """Error with n units left, [units + 1]: the cheapest others are gone."""
    removed: NDArray[np.float64] = np.concatenate([[0.0], np.cumsum(np.sort(losses.numpy()))])
    return removed[::-1]
