"""Budgets: what a model costs by its widths, and how a share of that is allocated to sites."""

from liar.selection.budget.budget import Budget
from liar.selection.budget.costs import Costs, flops, flops_of, params, params_of
from liar.selection.budget.greedy import TOLERANCE
from liar.selection.budget.latency import latency

__all__ = ["TOLERANCE", "Budget", "Costs", "flops", "flops_of", "latency", "params", "params_of"]
