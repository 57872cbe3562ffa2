"""Repairing a cut model: the walk over its blocks, and the closed-form steps that plug into it."""

from liar.repair.apply import adopt_blocks, apply_steps
from liar.repair.captures import Capture
from liar.repair.closed_form import (
    FitToDampedStream,
    FitToLayerOutput,
    FitToResidualStream,
    RefitProducers,
    closed_form_steps,
)
from liar.repair.comparison import compare_outputs, sequences_to_compare
from liar.repair.context import RepairContext
from liar.repair.data import RepairData, repair_data
from liar.repair.state import SiteState
from liar.repair.step import RepairStep
from liar.repair.teacher import check_teacher
from liar.repair.walker import walk_blocks

__all__ = [
    "Capture",
    "FitToDampedStream",
    "FitToLayerOutput",
    "FitToResidualStream",
    "RefitProducers",
    "RepairContext",
    "RepairData",
    "RepairStep",
    "SiteState",
    "adopt_blocks",
    "apply_steps",
    "check_teacher",
    "closed_form_steps",
    "compare_outputs",
    "repair_data",
    "sequences_to_compare",
    "walk_blocks",
]
