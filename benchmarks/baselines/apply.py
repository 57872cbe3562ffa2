"""Applying repair steps of the benchmarks to a model, with the library's walk over its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

import liar
from liar.repair import RepairStep, apply_steps


def apply_step(
    model: nn.Module,
    mask: liar.Mask,
    calib: Sequence[Any],
    step: RepairStep,
    *,
    has_pruned_stream: bool = True,
    teacher: nn.Module | None = None,
) -> None:
    """Cut the model and let one step repair every site; the model gets smaller in place.

    The dense stream is that of the teacher, if there is one.
    """
    layout = liar.discover(model)
    calibration = liar.Calibration.of(calib, model)
    cut = liar.Mask.of(mask, layout)
    apply_steps(model, layout, calibration, [step], cut, teacher=teacher, has_pruned_stream=has_pruned_stream)
