"""liar: makes a pruned transformer work again without training.

The three verbs are `select`, `reconstruct` and `prune`; `calibration` makes batches from texts, `save` and `load` keep slim
models, `collect` lets one look at the data serve many budgets, `moments` and `interpolation` let you look inside.
"""

from liar import families
from liar.api import prune, reconstruct, select
from liar.calibration import calibration
from liar.checkpoint import load, save
from liar.collect import Statistics, collect
from liar.costs import Costs, flops
from liar.errors import LiarError, Verdict
from liar.families import Family, SitePattern, register
from liar.interpolation import Interpolation, interpolation
from liar.mask import Mask
from liar.moments import moments
from liar.plots import plot
from liar.report import Report
from liar.timing import latency

__all__ = [
    "Costs",
    "Family",
    "Interpolation",
    "LiarError",
    "Mask",
    "Report",
    "SitePattern",
    "Statistics",
    "Verdict",
    "calibration",
    "collect",
    "families",
    "flops",
    "interpolation",
    "latency",
    "load",
    "moments",
    "plot",
    "prune",
    "reconstruct",
    "register",
    "save",
    "select",
]
