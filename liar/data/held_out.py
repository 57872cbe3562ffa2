"""Sequences on which a finished model is compared with the dense one, and which nothing was fitted to."""

from __future__ import annotations

import torch
from torch import Tensor

from liar.data.calibration_data import Calibration, refold, token_keys
from liar.data.copies import find_copies
from liar.data.sample import spread, take_sequences
from liar.errors import CalibrationError


def set_aside(calibration: Calibration, count: int) -> tuple[Calibration, Calibration]:
    """Take some sequences out of the calibration data: (the rest, those set aside).

    They are spread evenly over the data. A sequence that repeats another, whole or nearly, is never set aside: its copy would
    be among the rest. What is left is just what `Calibration.of` would make of it by itself.

    Args:
        calibration: the whole.
        count: how many to set aside; a quarter of the sequences at most.

    Raises:
        CalibrationError: fewer than two sequences, or all of them repeat others.

    Example:
        >>> rest, aside = set_aside(liar.Calibration.of(calib, model), 4)
        >>> rest.sequences, aside.sequences
        (28, 4)
    """
    leaders = _leaders(calibration)
    alone = (torch.bincount(leaders, minlength=len(leaders)) == 1)[leaders]
    if calibration.sequences < 2:
        raise CalibrationError(
            f"set_aside=True: expected at least 2 calibration sequences, got {calibration.sequences}; use more texts"
        )
    if not alone.any():
        raise CalibrationError(
            f"set_aside=True: each of the {calibration.sequences} calibration sequences repeats another, so none is new to the "
            "rest; use other texts, or pass some as held_out"
        )
    chosen = spread(calibration, min(count, max(calibration.sequences // 4, 1)), alone)
    return refold(take_sequences(calibration, ~chosen)), take_sequences(calibration, chosen)


def distinct_from(other: Calibration, calibration: Calibration) -> Tensor:
    """Which sequences of `other` do not repeat one of the calibration data, whole or nearly: bool [sequences]."""
    leaders = _leaders(calibration, other)
    return leaders[calibration.sequences :] >= calibration.sequences


def _leaders(*parts: Calibration) -> Tensor:
    """For every sequence of all parts, one after the other, the first one that it is a copy of: int64 [sequences]."""
    pairs = [pair for part in parts for pair in part.inputs]
    lengths = torch.cat([mask.sum(1).cpu() for mask, _ in pairs])
    real = lengths > 0  # sequences of padding only are copies of nothing
    leaders = torch.arange(len(lengths))
    if real.any():
        keys = torch.cat([token_keys(main, mask)[mask].cpu() for mask, main in pairs])
        piece = torch.arange(int(real.sum())).repeat_interleave(lengths[real]).numpy()
        leader, _ = find_copies(keys.numpy(), piece, piece)
        leaders[real] = leaders[real][torch.from_numpy(leader)]
    return leaders
