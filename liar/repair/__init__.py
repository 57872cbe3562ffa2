"""Repairing a cut model: the walk over its blocks, and the closed-form steps that plug into it."""

from liar.repair.apply import apply_steps
from liar.repair.captures import Capture
from liar.repair.closed_form import FitToLayerOutput, FitToResidualStream, RefitProducers, closed_form_steps
from liar.repair.context import RepairContext
from liar.repair.state import SiteState
from liar.repair.step import RepairStep
from liar.repair.teacher import check_teacher
from liar.repair.walker import walk_blocks

__all__ = [
    "Capture",
    "FitToLayerOutput",
    "FitToResidualStream",
    "RefitProducers",
    "RepairContext",
    "RepairStep",
    "SiteState",
    "apply_steps",
    "check_teacher",
    "closed_form_steps",
    "walk_blocks",
]
