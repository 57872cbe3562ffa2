"""Streamed moments of `[tokens, channels]`: products of what differs from a chunk's own mean, so that centring does not cancel.

Products are rounded to float32 and summed in float64, which is exact but for what is smaller than a 2^29th of the sum: in
whatever order chunks are added, and by whatever process, the sum is the same. What the means of the chunks add is computed at
the end, from all of them in their order, or for `RECENT` of them at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from liar.errors import CalibrationError
from liar.statistics.chunks import RANK_TOLERANCE, Chunks, add_gram, mirror
from liar.statistics.collectives import Collectives
from liar.statistics.normal import NO_ROWS, Normal, check_finite

# Chunks whose means are kept until they are added to the sums: with more, memory would grow with the number of rows.
RECENT = 128


class Chunk(NamedTuple):
    """What is kept of a chunk beside its products; the sums z and t are of weighted rows less the chunk's means."""

    rows: int
    weight_sum: float
    rank_tolerance: float
    mean_z: Tensor
    mean_t: Tensor
    z: Tensor
    t: Tensor


@dataclass(frozen=True)
class Within:
    """Sums over chunks of products of what differs from the chunks' own means; float64, of `gram` the upper triangle counts."""

    gram: Tensor
    cross: Tensor
    target_energy: Tensor

    @classmethod
    def none(cls, like: Chunk) -> Within:
        """Of no chunks yet, for such as this one."""
        z, t = like.mean_z.double(), like.mean_t.double()
        return cls(z.new_zeros(len(z), len(z)), z.new_zeros(len(z), len(t)), torch.zeros_like(t))

    def add(self, z: Tensor, t: Tensor) -> None:
        """Add the products of a chunk, in place."""
        add_gram(self.gram, z)
        self.cross.add_(z.T @ t)
        self.target_energy.add_(t.square().sum(0))


@dataclass(frozen=True)
class Sums:
    """Weighted sums over rows of (z - shift_z) and (t - shift_t), float64.

    `count` is the number of rows, `weight_sum` the sum of their weights, `target_energy` that of each target channel,
    `rank_tolerance` as in `Normal`. Of `gram`, only the upper triangle counts.
    """

    count: int
    weight_sum: float
    shift_z: Tensor
    shift_t: Tensor
    z: Tensor
    t: Tensor
    gram: Tensor
    cross: Tensor
    target_energy: Tensor
    rank_tolerance: float

    @classmethod
    def of(cls, chunks: Sequence[Chunk], within: Within, shift_z: Tensor, shift_t: Tensor) -> Sums:
        """Of some chunks, seen from a shift; `within` is used up."""
        n = torch.tensor([chunk.weight_sum for chunk in chunks], dtype=torch.float64, device=shift_z.device)[:, None]
        z, t = torch.stack([chunk.z for chunk in chunks]).double(), torch.stack([chunk.t for chunk in chunks]).double()
        dz = torch.stack([chunk.mean_z for chunk in chunks]) - shift_z
        dt = torch.stack([chunk.mean_t for chunk in chunks]) - shift_t
        moved_z, moved_t = z + n * dz, t + n * dt
        left = torch.cat([z, dz]).T
        return cls(
            count=sum(chunk.rows for chunk in chunks),
            weight_sum=sum(chunk.weight_sum for chunk in chunks),
            shift_z=shift_z,
            shift_t=shift_t,
            z=moved_z.sum(0),
            t=moved_t.sum(0),
            gram=within.gram.addmm_(left, torch.cat([dz, moved_z])),
            cross=within.cross.addmm_(left, torch.cat([dt, moved_t])),
            target_energy=within.target_energy + (2 * t * dt + n * dt.square()).sum(0),
            rank_tolerance=max(chunk.rank_tolerance for chunk in chunks),
        )

    @classmethod
    def none(cls, shift_z: Tensor, shift_t: Tensor) -> Sums:
        """Of no rows."""
        z, t = shift_z, shift_t
        gram, cross = z.new_zeros(len(z), len(z)), z.new_zeros(len(z), len(t))
        return cls(0, 0.0, z, t, torch.zeros_like(z), torch.zeros_like(t), gram, cross, torch.zeros_like(t), 0.0)

    def __add__(self, other: Sums) -> Sums:
        """Of one shift only; the big sums are added in place, self is used up."""
        self.gram.add_(other.gram)
        self.cross.add_(other.cross)
        return replace(
            self,
            count=self.count + other.count,
            weight_sum=self.weight_sum + other.weight_sum,
            z=self.z + other.z,
            t=self.t + other.t,
            target_energy=self.target_energy + other.target_energy,
            rank_tolerance=max(self.rank_tolerance, other.rank_tolerance),
        )

    def at(self, shift_z: Tensor, shift_t: Tensor) -> Sums:
        """The same rows seen from another shift (a new object; nothing is shared)."""
        dz, dt, n = self.shift_z - shift_z, self.shift_t - shift_t, self.weight_sum
        z, t = self.z + n * dz, self.t + n * dt
        left = torch.stack([self.z, dz], 1)
        return replace(
            self,
            shift_z=shift_z,
            shift_t=shift_t,
            z=z,
            t=t,
            # Both updates of a matrix in one pass over it.
            gram=torch.addmm(self.gram, left, torch.stack([dz, z])),
            cross=torch.addmm(self.cross, left, torch.stack([dt, t])),
            target_energy=self.target_energy + 2 * self.t * dt + n * dt.square(),
        )

    def has_shift_of(self, other: Sums) -> bool:
        """Whether both can be added as they are."""
        return self.shift_z is other.shift_z and self.shift_t is other.shift_t

    def over(self, processes: Collectives) -> Sums:
        """The sums over the rows of all processes, whose shifts are equal; added in place, self is used up."""
        numbers = processes.gather((self.count, self.weight_sum, self.rank_tolerance))
        counts, weight_sums, tolerances = zip(*numbers, strict=True)
        processes.add(self.gram, self.cross, self.z, self.t, self.target_energy)
        return replace(self, count=sum(counts), weight_sum=sum(weight_sums), rank_tolerance=max(tolerances))


class Moments:
    """Count, sums, Gram and cross moments of rows z beside rows t, seen from the mean of the first chunk.

    Memory: O((channels + RECENT) * (channels + out)), however many tokens.

    Args:
        origin: rows that earlier processes have, where several share the data; see `reduce_all`.

    Example:
        >>> z = torch.randn(100, 3, dtype=torch.float64)
        >>> moments = Moments()
        >>> moments.update(z, z.sum(1, keepdim=True))
        >>> moments.normal(affine=True).gram.shape
        torch.Size([3, 3])
    """

    def __init__(self, origin: int = 0) -> None:
        self._chunks = Chunks(origin)
        # Chunks that are not yet among the sums.
        self._recent: list[Chunk] = []
        self._within: Within | None = None
        self._sums: Sums | None = None
        # The shifts of all accumulators that were made together, once one of them has sums.
        self._shifts: list[Tensor] = []

    @classmethod
    def several(cls, origins: Sequence[int]) -> list[Moments]:
        """Empty ones that will have one shift, so that they are merged without being shifted first."""
        made = [cls(origin) for origin in origins]
        for each in made:
            each._shifts = made[0]._shifts
        return made

    def update(self, z: Tensor, t: Tensor, weight: Tensor | None = None, *, only: Tensor | None = None) -> None:
        """Add rows: z [tokens, channels], t [tokens, out], weight [tokens] (1 each if left out, then always).

        With `only`, int64, those rows in that order.
        """
        rows = (z, t) if weight is None else (z, t, weight)
        for chunk in self._chunks.add(*rows, only=only):
            self._add(*chunk)

    def _add(self, z: Tensor, t: Tensor, weight: Tensor | None = None) -> None:
        """Add a chunk, whose rows are overwritten."""
        means = z.mean(0), t.mean(0)
        z, t, weight_sum, count = z.sub_(means[0]), t.sub_(means[1]), float(len(z)), len(z)
        if weight is None:
            sums = z.sum(0), t.sum(0)
        else:
            root, weight_sum = weight.sqrt(), float(weight.sum(dtype=torch.float64))
            z, t = z.mul_(root[:, None]), t.mul_(root[:, None])
            sums = root @ z, root @ t
        chunk = Chunk(count, weight_sum, RANK_TOLERANCE[z.dtype], *means, *sums)
        if self._within is None:
            self._within = Within.none(chunk)
        self._within.add(z, t)
        self._recent.append(chunk)
        if len(self._recent) >= RECENT:
            self._fold()

    def _fold(self) -> None:
        """Add the recent chunks to the sums."""
        if not self._recent:
            return
        assert self._within is not None
        if self._sums is None and not self._shifts:
            self._shifts += [self._recent[0].mean_z.double(), self._recent[0].mean_t.double()]
        shift = self._shifts if self._sums is None else (self._sums.shift_z, self._sums.shift_t)
        added = Sums.of(self._recent, self._within, *shift)
        self._sums = added if self._sums is None else self._sums + added
        self._recent, self._within = [], None

    def merge(self, other: Moments) -> None:
        """Add another's rows. `other` keeps its content."""
        mine, theirs = self._all(), other._all()
        if theirs is None:
            return
        if mine is None:
            self._sums = replace(theirs, gram=theirs.gram.clone(), cross=theirs.cross.clone())
        else:
            self._sums = mine + (theirs if theirs.has_shift_of(mine) else theirs.at(mine.shift_z, mine.shift_t))

    @classmethod
    def reduce_all(cls, parts: Sequence[Moments], processes: Collectives) -> None:
        """Add the rows of all processes, in each of which there are as many accumulators; made by `several`, or a single one.

        Chunks that end in another process than they began in are completed in that one. Then products are added, one matrix at
        a time: beside its own, a process never holds those of another. The means of the chunks come together in their order.
        So the result is that of one process, to the last bit if rows are float32 and a process has less than `RECENT` chunks.
        """
        for part in parts:
            part._complete_chunks(processes)
            part._finish_chunk()
            part._gather_chunks(processes)
        own = [part._sums for part in parts]
        found = next((sums for sums in own if sums is not None), None)
        with_sums = processes.gather(found is not None)
        if any(with_sums):
            shift = processes.broadcast(found and (found.shift_z, found.shift_t), with_sums.index(True))
            for part, sums in zip(parts, own, strict=True):
                part._shifts[:] = shift
                seen = Sums.none(*shift) if sums is None else sums if sums.shift_z is shift[0] else sums.at(*shift)
                all_of_it = seen.over(processes)
                part._sums = all_of_it if all_of_it.count else None

    def reduce(self, processes: Collectives) -> None:
        """Add the rows of all processes."""
        self.reduce_all([self], processes)

    def _complete_chunks(self, processes: Collectives) -> None:
        """Give rows to the earlier process in which their chunk began, and take those of later ones."""
        head, ends = self._chunks.take_head()
        ends_in = processes.gather(ends)
        began_in = 0
        for process in range(1, processes.size()):
            rows = processes.broadcast(head, process)
            if rows and processes.rank() == began_in:
                self.update(*rows)
            if ends_in[process]:
                began_in = process

    def _gather_chunks(self, processes: Collectives) -> None:
        """Take the recent chunks of all processes, in their order, and the sums of their products."""
        own = [(chunk[:3], torch.cat(chunk[3:])) for chunk in self._recent]
        sizes = [len(value) for value in self._recent[0][3:]] if self._recent else []
        chunks: list[Chunk] = []
        for process in range(processes.size()):
            packed = [numbers for numbers, _ in own], torch.stack([rest for _, rest in own]) if own else None, sizes
            numbers, rows, widths = processes.broadcast(packed, process)
            if numbers:
                chunks += [Chunk(*each, *row.split(widths)) for each, row in zip(numbers, rows, strict=True)]
        if chunks:
            within = Within.none(chunks[0]) if self._within is None else self._within
            processes.add(within.gram, within.cross, within.target_energy)
            self._recent, self._within = chunks, within

    def _finish_chunk(self) -> None:
        for chunk in self._chunks.rest():
            self._add(*chunk)

    def _all(self) -> Sums | None:
        self._finish_chunk()
        self._fold()
        return self._sums

    def normal(self, *, affine: bool) -> Normal:
        """The normal equations of all rows so far, centred if `affine`.

        Raises:
            CalibrationError: no rows, or NaN or Inf among them.
        """
        sums = _checked(self._all())
        n, zeros = sums.weight_sum, (torch.zeros_like(sums.z), torch.zeros_like(sums.t))
        means = (sums.shift_z + sums.z / n, sums.shift_t + sums.t / n) if affine else zeros
        sums = sums.at(*means)
        return Normal(
            count=sums.count,
            weight_sum=n,
            gram=mirror(sums.gram),
            cross=sums.cross,
            target_energies=sums.target_energy,
            mean_z=means[0],
            mean_t=means[1],
            affine=affine,
            rank_tolerance=sums.rank_tolerance,
        )

    @property
    def count(self) -> int:
        """Rows so far."""
        sums = self._all()
        return 0 if sums is None else sums.count

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later: plain tensors and numbers, which later rows do not change."""
        sums = self._all()
        if sums is None:
            return {}
        own = sums.at(sums.shift_z, sums.shift_t)
        return {field.name: getattr(own, field.name) for field in fields(own)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the content by what `state_dict` gave."""
        self._chunks, self._recent, self._within, self._sums = Chunks(), [], None, None
        self._shifts.clear()
        if state:
            sums = Sums(**state)
            self._sums = sums.at(sums.shift_z, sums.shift_t)
            self._shifts += [sums.shift_z, sums.shift_t]


def _checked(sums: Sums | None) -> Sums:
    if sums is None:
        raise CalibrationError(NO_ROWS)
    check_finite(sums.gram, sums.cross, sums.target_energy)
    if not sums.weight_sum > 0:
        raise CalibrationError("the activations are so large that no token has a weight: the model is damaged, or overflows")
    return sums
