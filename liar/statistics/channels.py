"""Statistics of single channels, for criteria."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liar.errors import CalibrationError
from liar.statistics.collectives import Collectives, merge_over
from liar.statistics.normal import NO_ROWS, check_finite


class ChannelMoments:
    """Mean, variance and norm of every channel, streamed: what criteria need, in O(channels) memory."""

    def __init__(self) -> None:
        self.count = 0
        self._mean = torch.zeros(())
        self._m2 = torch.zeros(())

    def update(self, x: Tensor) -> None:
        """Add rows [tokens, channels] (Chan's parallel update, so batches of any size give one answer)."""
        if not len(x):
            return
        # Variances of a chunk in the rows' own float type, sums of chunks in float64.
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = x.mean(0)
        m2, mean = (x - mean).square().sum(0).double(), mean.double()
        self._add(len(x), mean, m2)

    def _add(self, count: int, mean: Tensor, m2: Tensor) -> None:
        total, delta = self.count + count, mean - self._mean
        self._m2 = self._m2 + m2 + delta.square() * self.count * count / total
        self._mean = self._mean + delta * count / total
        self.count = total

    def merge(self, other: ChannelMoments) -> None:
        """Add another's rows. `other` keeps its content."""
        if other.count:
            self._add(other.count, other._mean, other._m2)

    def reduce(self, processes: Collectives) -> None:
        """Add the rows of all processes."""
        merge_over(processes, self)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later."""
        return {"count": self.count, "mean": self._mean, "m2": self._m2}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the content by what `state_dict` gave."""
        self.count, self._mean, self._m2 = (state[name] for name in ("count", "mean", "m2"))

    @property
    def mean(self) -> Tensor:
        """[channels] float64."""
        if not self.count:
            raise CalibrationError(NO_ROWS)
        check_finite(self._mean)
        return self._mean

    @property
    def variance(self) -> Tensor:
        """[channels] float64, divided by the count."""
        check_finite(self.mean, self._m2)
        return self._m2 / self.count
