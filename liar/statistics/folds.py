"""Statistics by fold of the calibration data."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from liar.statistics.factor import Factor
from liar.statistics.moments import Moments
from liar.statistics.normal import Normal

# Rows per channel from which one held-out fold is enough to choose a ridge.
PLENTY = 10


class Folds:
    """One accumulator per fold of the calibration data, so that what is fitted can be tested on what was left out.

    Args:
        folds: how many.
        kind: `Moments` or `Factor`.
    """

    def __init__(self, folds: int, kind: type[Moments] | type[Factor] = Moments) -> None:
        self._kind = kind
        self._parts: list[Any] = [kind() for _ in range(folds)]

    def update(self, z: Tensor, t: Tensor, fold: Tensor) -> None:
        """Add rows z [tokens, channels], t [tokens, out] of the folds given by `fold` int64 [tokens]."""
        for number, part in enumerate(self._parts):
            rows = (fold == number).nonzero().squeeze(1)
            if len(rows):
                part.update(z[rows], t[rows])

    def whole(self, *, affine: bool) -> Normal:
        """The normal equations of all rows."""
        normal: Normal = self._joined(self._parts).normal(affine=affine)
        return normal

    def splits(self, *, affine: bool, channels: int) -> list[tuple[Normal, Normal]]:
        """(all but one fold, that fold): for every fold that has rows, or for one where there are plenty of rows.

        The fewer rows per channel, the more an answer depends on which rows were held out. Empty if one fold has all rows.
        """
        parts = [part for part in self._parts if part.count]
        if len(parts) < 2:
            return []
        plenty = sum(part.count for part in parts) >= PLENTY * channels
        return [
            (self._joined(parts[:i] + parts[i + 1 :]).normal(affine=affine), part.normal(affine=affine))
            for i, part in enumerate(parts[:1] if plenty else parts)
        ]

    def _joined(self, parts: list[Any]) -> Any:
        joined = self._kind()
        for part in parts:
            joined.merge(part)
        return joined
