"""Which units stay: a criterion gives every unit a score, `allocate` turns scores and a budget into a mask."""

from liar.criteria.allocate import SCOPES, allocate, check_drop
from liar.criteria.budget import Budget, check_keep
from liar.criteria.elimination import Elimination, eliminate
from liar.criteria.fill import TOLERANCE
from liar.criteria.scores import CRITERIA, NEEDS, Units, scores

__all__ = [
    "CRITERIA",
    "NEEDS",
    "SCOPES",
    "TOLERANCE",
    "Budget",
    "Elimination",
    "Units",
    "allocate",
    "check_drop",
    "check_keep",
    "eliminate",
    "scores",
]
