"""The sequences that are trained on, and those that are held out to stop early and to tell whether it helped."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from liar.data import FOLDS, Calibration, take
from liar.errors import CalibrationError

# Sequences whose first piece is in this fold are held out. Copies share a fold, so none is on both sides.
HELD_OUT = 0


@dataclass(frozen=True)
class HeldOut:
    """Calibration data in small batches: first those that are trained on, then those that are held out.

    Attributes:
        calibration: all of them.
        training: numbers of the batches that are trained on.
        held_out: numbers of the others.
    """

    calibration: Calibration
    training: range
    held_out: range


def hold_out(calibration: Calibration, sequences: int) -> HeldOut:
    """Split calibration data by whole sequences, about one in `FOLDS` held out.

    Args:
        calibration: the whole.
        sequences: in a batch, at most; they come from one batch of the user's, whose sequences are of similar length.

    Raises:
        CalibrationError: nothing is left on one side.
    """
    sides: dict[bool, list[tuple[int, Tensor]]] = {True: [], False: []}
    for number in range(len(calibration.batches)):
        held = _held_out(calibration, number)
        for side, batches in sides.items():
            rows = (held == side).nonzero().squeeze(1)
            batches += [(number, part) for part in torch.split(rows, sequences) if len(part)]
    training, held_out = (take(calibration, sides[side]).sequences if sides[side] else 0 for side in (False, True))
    if not training or not held_out:
        raise CalibrationError(
            f"the calibration data has {calibration.sequences} sequences, of which {held_out} can be held out and {training} "
            f"trained on (copies stay together, and one in {FOLDS} is held out): expected some of both; use at least "
            f"{2 * FOLDS} different sequences"
        )
    count = len(sides[False])
    both = take(calibration, [*sides[False], *sides[True]])
    return HeldOut(both, range(count), range(count, len(both.batches)))


def _held_out(calibration: Calibration, number: int) -> Tensor:
    """Of one batch, which sequences are held out: bool [sequences]. Those without a real token are on neither side's books."""
    mask = calibration.token_masks[number]
    fold = torch.full(mask.shape, -1, device=mask.device)
    fold[mask] = calibration.folds[number]
    first = mask.int().argmax(1, keepdim=True)
    return fold.gather(1, first).squeeze(1) == HELD_OUT
