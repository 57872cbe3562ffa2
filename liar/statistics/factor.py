"""The streamed R factor: the same normal equations without squaring the condition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from liar.errors import CalibrationError
from liar.statistics.chunks import RANK_TOLERANCE, Chunks
from liar.statistics.collectives import Collectives, merge_over
from liar.statistics.normal import NO_ROWS, Normal, check_finite


class Factor:
    """The triangular factor R of the rows [1, z, t], updated by QR in float64: half the condition of a Gram matrix.

    Same use as `Moments`; slower (a QR per chunk), for badly conditioned sites and `solver="lstsq"`.

    Example:
        >>> z = torch.randn(100, 3, dtype=torch.float64)
        >>> factor = Factor()
        >>> factor.update(z, z.sum(1, keepdim=True))
        >>> normal = factor.normal(affine=True)
        >>> torch.allclose(normal.gram @ torch.ones(3, 1, dtype=torch.float64), normal.cross)
        True
    """

    def __init__(self) -> None:
        self._chunks = Chunks()
        self._count = 0
        self._weight_sum = 0.0
        self._channels = 0
        self._r: Tensor | None = None

    @classmethod
    def several(cls, origins: Sequence[int]) -> list[Factor]:
        """Empty ones, to be merged later; all is in float64, so it does not matter where chunks begin."""
        return [cls() for _ in origins]

    def update(self, z: Tensor, t: Tensor, weight: Tensor | None = None, *, only: Tensor | None = None) -> None:
        """Add rows: z [tokens, channels], t [tokens, out], weight [tokens] (1 each if left out, then always).

        With `only`, int64, those rows in that order.
        """
        rows = (z, t) if weight is None else (z, t, weight)
        for chunk in self._chunks.add(*rows, only=only):
            self._add(*chunk)

    def _add(self, z: Tensor, t: Tensor, weight: Tensor | None = None) -> None:
        root = z.new_ones(len(z), 1) if weight is None else weight.sqrt()[:, None]
        rows = torch.cat([root, z * root, t * root], 1).double()
        self._stack(rows, len(z), float(root.double().square().sum()), z.shape[1])

    def _stack(self, rows: Tensor, count: int, weight_sum: float, channels: int) -> None:
        check_finite(rows)
        self._count += count
        self._weight_sum += weight_sum
        self._channels = channels
        self._r = torch.linalg.qr(rows if self._r is None else torch.cat([self._r, rows]), mode="r").R

    def _all(self) -> Tensor | None:
        for chunk in self._chunks.rest():
            self._add(*chunk)
        return self._r

    def merge(self, other: Factor) -> None:
        """Add another's rows. `other` keeps its content."""
        self._all()
        theirs = other._all()
        if theirs is not None:
            self._stack(theirs, other._count, other._weight_sum, other._channels)

    @classmethod
    def reduce_all(cls, parts: Sequence[Factor], processes: Collectives) -> None:
        """Add the rows of all processes, in each of which there are as many accumulators: one factor comes at a time."""
        for part in parts:
            merge_over(processes, part)

    @property
    def count(self) -> int:
        """Rows so far."""
        self._all()
        return self._count

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later: plain tensors and numbers."""
        r = self._all()
        if r is None:
            return {}
        return {"r": r, "count": self._count, "weight_sum": self._weight_sum, "channels": self._channels}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the content by what `state_dict` gave."""
        self._chunks, self._count, self._weight_sum, self._channels, self._r = Chunks(), 0, 0.0, 0, None
        if state:
            self._r, self._count, self._weight_sum, self._channels = (
                state[name] for name in ("r", "count", "weight_sum", "channels")
            )

    def normal(self, *, affine: bool) -> Normal:
        """As `Moments.normal`, with `factor` set. The column of ones comes first, so what stands below it is centred."""
        r = self._all()
        if r is None:
            raise CalibrationError(NO_ROWS)
        r = torch.nn.functional.pad(r, (0, 0, 0, r.shape[1] - r.shape[0]))
        skipped = 1 if affine else 0
        z, t = r[skipped:, 1 : 1 + self._channels], r[skipped:, 1 + self._channels :]
        mean = r[0] / r[0, 0] if affine else torch.zeros_like(r[0])
        reached = self._channels + 1 - skipped  # z is zero in all rows below
        return Normal(
            count=self._count,
            weight_sum=self._weight_sum,
            gram=z.T @ z,
            cross=z.T @ t,
            target_energies=t.square().sum(0),
            mean_z=mean[1 : 1 + self._channels],
            mean_t=mean[1 + self._channels :],
            affine=affine,
            rank_tolerance=RANK_TOLERANCE[torch.float64],
            factor=(z[:reached], t[:reached]),
        )
