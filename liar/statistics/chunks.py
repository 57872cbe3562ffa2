"""Rows gathered to chunks of a fixed size: the one place where the precision of products is decided.

A chunk is multiplied in float32 (float64 for float64 rows), and the sums over chunks are kept in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

CHUNK = 2048
# Channels from which half a product is faster than a whole one.
SYMMETRIC = 256
# Share of a Gram matrix's largest eigenvalue below which a direction is rounding error, by the precision of the products.
RANK_TOLERANCE = {torch.float32: 1e-7, torch.float64: 1e-13}


class Chunks:
    """Gathers rows to chunks of `CHUNK`, so that sums do not depend on how the data was batched.

    Rows come as several tensors of one length, [tokens, ...] each, and go as they came, as copies that may be overwritten.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, ...]] = []
        self._rows = 0

    def add(self, *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Take rows, give the chunks that are full."""
        self._waiting.append(rows)
        self._rows += len(rows[0])
        if self._rows < CHUNK:
            return
        rows = self._joined()
        full = self._rows // CHUNK * CHUNK
        for start in range(0, full, CHUNK):
            yield _computed(part[start : start + CHUNK] for part in rows)
        # A view would keep the whole joined chunk alive.
        self._waiting, self._rows = [tuple(part[full:].clone() for part in rows)], self._rows - full

    def rest(self) -> Iterator[tuple[Tensor, ...]]:
        """Give what is left, if anything."""
        if self._rows:
            yield _computed(self._joined())
            self._waiting, self._rows = [], 0

    def _joined(self) -> tuple[Tensor, ...]:
        return tuple(torch.cat(parts) for parts in zip(*self._waiting, strict=True))


def _computed(rows: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """The precision decision: if any part is float64 all are, everything else is multiplied in float32."""
    rows = tuple(rows)
    dtype = torch.float64 if torch.float64 in {part.dtype for part in rows} else torch.float32
    return tuple(part.to(dtype) for part in rows)


def gram(z: Tensor) -> Tensor:
    """`z' z` of z [tokens, channels], the products below the diagonal left out where that saves time."""
    channels = z.shape[1]
    if channels < SYMMETRIC:
        return z.T @ z
    half, result = channels // 2, z.new_empty(channels, channels)
    result[:half, :half], result[half:, half:] = gram(z[:, :half]), gram(z[:, half:])
    result[:half, half:] = z[:, :half].T @ z[:, half:]
    result[half:, :half] = result[:half, half:].T
    return result
