"""Rows gathered to chunks of a fixed size: the one place where the precision of products is decided.

A chunk is multiplied in float32 (float64 for float64 rows), and the sums over chunks are kept in float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 2048
# Share of a Gram matrix's largest eigenvalue below which a direction is rounding, by the precision of the products.
NOISE = {torch.float32: 1e-7, torch.float64: 1e-13}


class Chunks:
    """Gathers rows to chunks of `CHUNK`, so that sums do not depend on how the data was batched."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._rows = 0

    def add(self, z: Tensor, t: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Take rows, give the chunks that are full."""
        self._waiting.append((z, t))
        self._rows += len(z)
        if self._rows < CHUNK:
            return
        z, t = self._joined()
        whole = len(z) // CHUNK * CHUNK
        for start in range(0, whole, CHUNK):
            yield _computed(z[start : start + CHUNK], t[start : start + CHUNK])
        # A view would keep the whole joined chunk alive.
        self._waiting, self._rows = [(z[whole:].clone(), t[whole:].clone())], len(z) - whole

    def rest(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Give what is left, if anything."""
        if self._rows:
            yield _computed(*self._joined())
            self._waiting, self._rows = [], 0

    def _joined(self) -> tuple[Tensor, Tensor]:
        z, t = zip(*self._waiting, strict=True)
        return torch.cat(z), torch.cat(t)


def _computed(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The precision decision: float64 stays, everything else is multiplied in float32."""
    dtype = torch.float64 if torch.float64 in (z.dtype, t.dtype) else torch.float32
    return z.to(dtype), t.to(dtype)
