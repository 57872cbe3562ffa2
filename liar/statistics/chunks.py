"""Rows gathered to chunks of a fixed size: the one place where the precision of products is decided.

A chunk is multiplied in float32 (float64 for float64 rows), and the sums over chunks are kept in float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 2048
# Rows of a Gram matrix that are computed at a time, from the diagonal on.
STRIP = 128
# Share of a Gram matrix's largest eigenvalue below which a direction is rounding error, by the precision of the products.
RANK_TOLERANCE = {torch.float32: 1e-7, torch.float64: 1e-13}


class Chunks:
    """Gathers rows to chunks of `CHUNK`, so that sums do not depend on how the data was batched.

    Rows come as several tensors of one length, [tokens, ...] each, and go as they came, in buffers that may be overwritten and
    are filled again for the next chunk. If any of the tensors is float64 all are, everything else is multiplied in float32.

    Nor should sums depend on how the rows are shared among processes, so chunks begin where they would if one had them all:
    the rows before the first such place (`head`) belong to the last chunk of an earlier process.

    Args:
        origin: rows that earlier processes have.
    """

    def __init__(self, origin: int = 0) -> None:
        self._buffers: tuple[Tensor, ...] = ()
        self._used = 0
        self._missing = -origin % CHUNK
        self._head: tuple[Tensor, ...] = ()

    def add(self, *rows: Tensor, only: Tensor | None = None) -> Iterator[tuple[Tensor, ...]]:
        """Take rows, all or only those with some numbers (int64), in that order; give the chunks that are full."""
        dtype = torch.float64 if torch.float64 in {part.dtype for part in rows} else torch.float32
        if not self._buffers:
            self._buffers = tuple(part.new_empty(CHUNK, *part.shape[1:], dtype=dtype) for part in rows)
        elif dtype == torch.float64:
            self._buffers = tuple(buffer.double() for buffer in self._buffers)
        start, count = 0, len(rows[0]) if only is None else len(only)
        while start < count:
            full = self._missing or CHUNK
            size = min(full - self._used, count - start)
            for buffer, part in zip(self._buffers, rows, strict=True):
                place = buffer[self._used : self._used + size]
                if only is None:
                    place.copy_(part[start : start + size])
                elif part.dtype == place.dtype:
                    torch.index_select(part, 0, only[start : start + size], out=place)
                else:
                    place.copy_(part.index_select(0, only[start : start + size]))
            start, self._used = start + size, self._used + size
            if self._used == full and self._missing:
                self._head, self._missing, self._used = self._copies(), 0, 0
            elif self._used == full:
                self._used = 0
                yield self._buffers

    def rest(self) -> Iterator[tuple[Tensor, ...]]:
        """Give what is left, if anything."""
        if self._head:
            yield self._head
        if self._used:
            yield tuple(buffer[: self._used] for buffer in self._buffers)
        self._buffers, self._used, self._head, self._missing = (), 0, (), 0

    def take_head(self) -> tuple[tuple[Tensor, ...], bool]:
        """Take out the rows of a chunk that began in an earlier process, and say whether it ends in this one."""
        ends = not self._missing
        if not ends:
            self._head, self._used = self._copies(), 0
        head, self._head = self._head, ()
        return head, ends

    def _copies(self) -> tuple[Tensor, ...]:
        return tuple(buffer[: self._used].clone() for buffer in self._buffers)


def add_gram(total: Tensor, z: Tensor) -> None:
    """Add `z' z` of z [tokens, channels] to the upper triangle of a sum, in strips; what is below the diagonal is left open."""
    for start in range(0, len(total), STRIP):
        strip = slice(start, start + STRIP)
        total[strip, start:] += z[:, strip].T @ z[:, start:]


def mirror(upper: Tensor) -> Tensor:
    """Complete a symmetric matrix of which the upper triangle is there, in place."""
    for start in range(0, len(upper), STRIP):
        stop = start + STRIP
        upper[stop:, start:stop] = upper[start:stop, stop:].T
        corner = upper[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)
    return upper
