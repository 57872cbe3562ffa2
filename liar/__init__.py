"""liar: makes a pruned transformer work again without training.

The three verbs are `select`, `reconstruct` and `prune`; `calibration` makes batches from texts.
"""

from liar import families
from liar.api import prune, reconstruct, select
from liar.calibration import calibration
from liar.checkpoint import load, save
from liar.errors import LiarError, Verdict
from liar.families import Family, SitePattern, register
from liar.mask import Mask
from liar.plots import plot
from liar.report import Report

__all__ = [
    "Family",
    "LiarError",
    "Mask",
    "Report",
    "SitePattern",
    "Verdict",
    "calibration",
    "families",
    "load",
    "plot",
    "prune",
    "reconstruct",
    "register",
    "save",
    "select",
]
