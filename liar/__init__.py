"""liar: makes a pruned transformer work again without training.

The three verbs are `select`, `reconstruct` and `prune`; `calibration` makes batches from texts, `save` and `load` keep pruned
models, `collect` reuses statistics for many budgets, `discover` shows where a model can be cut, `remove` cuts without repair,
`moments` and `interpolation` let you look inside.
"""

from liar.analysis import Interpolation, interpolation, moments
from liar.api import prune, reconstruct, select
from liar.data import Calibration, calibration
from liar.errors import LiarError
from liar.io import load, save
from liar.mask import Mask
from liar.models import Family, FusedProducer, SitePattern, discover, families, register
from liar.report import Report, plot
from liar.selection import Costs, CriterionStatistics, collect, flops, latency
from liar.surgery import remove
from liar.verdicts import Verdict

__all__ = [
    "Calibration",
    "Costs",
    "CriterionStatistics",
    "Family",
    "FusedProducer",
    "Interpolation",
    "LiarError",
    "Mask",
    "Report",
    "SitePattern",
    "Verdict",
    "calibration",
    "collect",
    "discover",
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
    "remove",
    "save",
    "select",
]
