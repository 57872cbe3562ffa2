"""liar: makes a pruned transformer work again without training.

The three verbs are `select`, `reconstruct` and `prune`; `calibration` makes batches from texts, `save` and `load` keep slim
models, `collect` and `interpolation` let you look inside.
"""

from liar import families
from liar.api import prune, reconstruct, select
from liar.calibration import calibration
from liar.checkpoint import load, save
from liar.collect import collect
from liar.errors import LiarError, Verdict
from liar.families import Family, SitePattern, register
from liar.interpolation import Interpolation, interpolation
from liar.mask import Mask
from liar.plots import plot
from liar.report import Report

__all__ = [
    "Family",
    "Interpolation",
    "LiarError",
    "Mask",
    "Report",
    "SitePattern",
    "Verdict",
    "calibration",
    "collect",
    "families",
    "interpolation",
    "load",
    "plot",
    "prune",
    "reconstruct",
    "register",
    "save",
    "select",
]
