"""Which units stay: a criterion gives every unit a score, `allocate` turns scores and a budget into a mask."""

from liar.criteria.allocate import SCOPES, allocate
from liar.criteria.scores import CRITERIA, Units, scores

__all__ = ["CRITERIA", "SCOPES", "Units", "allocate", "scores"]
