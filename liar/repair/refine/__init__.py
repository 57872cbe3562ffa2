"""Gradient reconstruction: kept weights trained on the teacher's activations, window by window."""

from liar.repair.refine.fits import Fit, fit_of
from liar.repair.refine.held_out import HeldOut, hold_out
from liar.repair.refine.lora import check_lora
from liar.repair.refine.outputs import last_hidden_error
from liar.repair.refine.plan import Window, windows_of
from liar.repair.refine.training import Training, train
from liar.repair.refine.walk import Outcome, Refinement, refine_windows

__all__ = [
    "Fit",
    "HeldOut",
    "Outcome",
    "Refinement",
    "Training",
    "Window",
    "check_lora",
    "fit_of",
    "hold_out",
    "last_hidden_error",
    "refine_windows",
    "train",
    "windows_of",
]
