"""Which units stay: a criterion gives every unit a score, and a budget turns scores into a mask."""

from liar.selection.allocate import allocate
from liar.selection.budget import TOLERANCE, Budget, Costs, flops, flops_of, latency, params, params_of
from liar.selection.collect import CriterionStatistics, collect_with, stages_of
from liar.selection.elimination import Elimination, eliminate
from liar.selection.queries import best_of_groups, by_rank, rank_scores
from liar.selection.scores import CRITERIA, STATISTICS, Criterion, SiteWeights, register_criterion, scores, source_of

__all__ = [
    "CRITERIA",
    "STATISTICS",
    "TOLERANCE",
    "Budget",
    "Costs",
    "Criterion",
    "CriterionStatistics",
    "Elimination",
    "SiteWeights",
    "allocate",
    "best_of_groups",
    "by_rank",
    "collect_with",
    "eliminate",
    "flops",
    "flops_of",
    "latency",
    "params",
    "params_of",
    "rank_scores",
    "register_criterion",
    "scores",
    "source_of",
    "stages_of",
]
