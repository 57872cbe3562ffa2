"""Streamed moments of `[tokens, channels]`: the one place where rows become sums, and where precision is decided.

Rows are gathered into chunks of a fixed size, whatever the batches were; a chunk's products are formed in float32 (float64
for float64 rows), shifted by the first chunk's mean so that centring does not cancel, and summed in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from liar.errors import CalibrationError

CHUNK = 2048


@dataclass(frozen=True)
class Normal:
    """Normal equations of `min |t - z V - 1 b|^2`, all float64; the frozen answer of `Moments` and `Factor`.

    Attributes:
        count: number of rows (tokens).
        gram: [channels, channels], `z' z` (centred if `affine`).
        cross: [channels, out], `z' t` (centred if `affine`).
        power: sum of squares of t (centred if `affine`).
        mean_z: [channels]; zero if not `affine`.
        mean_t: [out]; zero if not `affine`.
        affine: whether an intercept is part of the model.
        factor: R of the QR decomposition of z and the rotated t, ([channels, channels], [channels, out]), where it was
            streamed (`Factor`).
    """

    count: int
    gram: Tensor
    cross: Tensor
    power: float
    mean_z: Tensor
    mean_t: Tensor
    affine: bool
    factor: tuple[Tensor, Tensor] | None = None

    @property
    def scale(self) -> float:
        """Mean diagonal of the Gram matrix: the unit of a relative ridge."""
        return float(self.gram.diagonal().mean())

    def error(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Sum of squares of `t - z weight - bias` over these rows: weight [*, channels, out], bias [*, out] -> [*]."""
        quadratic = (weight * (self.gram @ weight - 2 * self.cross)).sum((-2, -1))
        offset = self.mean_t - self.mean_z @ weight - bias
        return quadratic + self.power + self.count * offset.square().sum(-1)


class _Chunks:
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


@dataclass(frozen=True)
class _Sums:
    """Sums over rows of (z - shift_z) and (t - shift_t), float64; `power` is per target channel."""

    count: int
    shift_z: Tensor
    shift_t: Tensor
    z: Tensor
    t: Tensor
    gram: Tensor
    cross: Tensor
    power: Tensor

    @classmethod
    def of(cls, z: Tensor, t: Tensor, shift_z: Tensor, shift_t: Tensor) -> _Sums:
        z, t = z - shift_z.to(z), t - shift_t.to(t)
        return cls(
            count=len(z),
            shift_z=shift_z,
            shift_t=shift_t,
            z=z.sum(0).double(),
            t=t.sum(0).double(),
            gram=(z.T @ z).double(),
            cross=(z.T @ t).double(),
            power=t.square().sum(0).double(),
        )

    def __add__(self, other: _Sums) -> _Sums:
        """Of one shift only; the big sums are added in place, self is used up."""
        return replace(
            self,
            count=self.count + other.count,
            z=self.z + other.z,
            t=self.t + other.t,
            gram=self.gram.add_(other.gram),
            cross=self.cross.add_(other.cross),
            power=self.power + other.power,
        )

    def at(self, shift_z: Tensor, shift_t: Tensor) -> _Sums:
        """The same rows seen from another shift (a new object; nothing is shared)."""
        dz, dt, n = self.shift_z - shift_z, self.shift_t - shift_t, self.count
        return _Sums(
            count=n,
            shift_z=shift_z,
            shift_t=shift_t,
            z=self.z + n * dz,
            t=self.t + n * dt,
            gram=self.gram + torch.outer(self.z, dz) + torch.outer(dz, self.z + n * dz),
            cross=self.cross + torch.outer(self.z, dt) + torch.outer(dz, self.t + n * dt),
            power=self.power + 2 * self.t * dt + n * dt.square(),
        )


class Moments:
    """Count, sums, Gram and cross moments of rows z beside rows t, shifted by the mean of the first chunk.

    Memory: O(channels * (channels + out)), however many tokens.

    Example:
        >>> z = torch.randn(100, 3, dtype=torch.float64)
        >>> moments = Moments()
        >>> moments.update(z, z.sum(1, keepdim=True))
        >>> moments.normal(affine=True).gram.shape
        torch.Size([3, 3])
    """

    def __init__(self) -> None:
        self._chunks = _Chunks()
        self._sums: _Sums | None = None

    def update(self, z: Tensor, t: Tensor) -> None:
        """Add rows: z [tokens, channels], t [tokens, out]."""
        for chunk in self._chunks.add(z, t):
            self._add(*chunk)

    def _add(self, z: Tensor, t: Tensor) -> None:
        if self._sums is None:
            self._sums = _Sums.of(z, t, z.mean(0).double(), t.mean(0).double())
        else:
            self._sums += _Sums.of(z, t, self._sums.shift_z, self._sums.shift_t)

    def merge(self, other: Moments) -> None:
        """Add another's rows. `other` keeps its content."""
        mine, theirs = self._all(), other._all()
        if theirs is not None:
            self._sums = theirs.at(theirs.shift_z, theirs.shift_t) if mine is None else mine + theirs.at(
                mine.shift_z, mine.shift_t
            )  # fmt: skip

    def _all(self) -> _Sums | None:
        for chunk in self._chunks.rest():
            self._add(*chunk)
        return self._sums

    def normal(self, *, affine: bool) -> Normal:
        """The normal equations of all rows so far, centred if `affine`.

        Raises:
            CalibrationError: no rows, or NaN or Inf among them.
        """
        sums = _checked(self._all())
        n, zeros = sums.count, (torch.zeros_like(sums.z), torch.zeros_like(sums.t))
        means = (sums.shift_z + sums.z / n, sums.shift_t + sums.t / n) if affine else zeros
        sums = sums.at(*means)
        return Normal(
            count=n,
            gram=sums.gram,
            cross=sums.cross,
            power=float(sums.power.sum()),
            mean_z=means[0],
            mean_t=means[1],
            affine=affine,
        )

    @property
    def count(self) -> int:
        """Rows so far."""
        sums = self._all()
        return 0 if sums is None else sums.count

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later: plain tensors and the count."""
        sums = self._all()
        return {} if sums is None else {field.name: getattr(sums, field.name) for field in fields(sums)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the content by what `state_dict` gave."""
        self._chunks, self._sums = _Chunks(), None
        if state:
            sums = _Sums(**state)
            self._sums = sums.at(sums.shift_z, sums.shift_t)


class Factor:
    """The triangular factor R of the rows [1, z, t], updated by QR in float64: half the condition of a Gram matrix.

    Same use as `Moments`; slower (a QR per chunk), for badly conditioned sites and `solver="lstsq"`.
    """

    def __init__(self) -> None:
        self._chunks = _Chunks()
        self._count = 0
        self._channels = 0
        self._r: Tensor | None = None

    def update(self, z: Tensor, t: Tensor) -> None:
        """Add rows: z [tokens, channels], t [tokens, out]."""
        for chunk in self._chunks.add(z, t):
            self._add(*chunk)

    def _add(self, z: Tensor, t: Tensor) -> None:
        self._stack(torch.cat([z.new_ones(len(z), 1), z, t], 1).double(), len(z), z.shape[1])

    def _stack(self, rows: Tensor, count: int, channels: int) -> None:
        _check_finite(rows)
        self._count += count
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
            self._stack(theirs, other._count, other._channels)

    @property
    def count(self) -> int:
        """Rows so far."""
        self._all()
        return self._count

    def normal(self, *, affine: bool) -> Normal:
        """As `Moments.normal`, with `factor` set. The column of ones comes first, so what stands below it is centred."""
        r = self._all()
        if r is None:
            raise CalibrationError(_NO_ROWS)
        r = torch.nn.functional.pad(r, (0, 0, 0, r.shape[1] - r.shape[0]))
        skipped = 1 if affine else 0
        z, t = r[skipped:, 1 : 1 + self._channels], r[skipped:, 1 + self._channels :]
        mean = r[0] / r[0, 0] if affine else torch.zeros_like(r[0])
        reached = self._channels + 1 - skipped  # z is zero in all rows below
        return Normal(
            count=self._count,
            gram=z.T @ z,
            cross=z.T @ t,
            power=float(t.square().sum()),
            mean_z=mean[1 : 1 + self._channels],
            mean_t=mean[1 + self._channels :],
            affine=affine,
            factor=(z[:reached], t[:reached]),
        )


_NO_ROWS = "no calibration token reached the layer"


def _check_finite(*values: Tensor) -> None:
    if not all(bool(torch.isfinite(value).all()) for value in values):
        raise CalibrationError("NaN or Inf in the activations")


def _checked(sums: _Sums | None) -> _Sums:
    if sums is None:
        raise CalibrationError(_NO_ROWS)
    _check_finite(sums.gram, sums.cross, sums.power)
    return sums


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
        return self._joined(self._parts).normal(affine=affine)

    def splits(self, *, affine: bool) -> list[tuple[Normal, Normal]]:
        """(all but one fold, that fold), for every fold that has rows; empty if only one has."""
        parts = [part for part in self._parts if part.count]
        if len(parts) < 2:
            return []
        return [
            (self._joined(parts[:i] + parts[i + 1 :]).normal(affine=affine), part.normal(affine=affine))
            for i, part in enumerate(parts)
        ]

    def _joined(self, parts: list[Any]) -> Any:
        joined = self._kind()
        for part in parts:
            joined.merge(part)
        return joined


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
        total, delta = self.count + len(x), mean - self._mean
        self._m2 = self._m2 + m2 + delta.square() * self.count * len(x) / total
        self._mean = self._mean + delta * len(x) / total
        self.count = total

    @property
    def mean(self) -> Tensor:
        """[channels] float64."""
        if not self.count:
            raise CalibrationError(_NO_ROWS)
        _check_finite(self._mean)
        return self._mean

    @property
    def variance(self) -> Tensor:
        """[channels] float64, divided by the count."""
        _check_finite(self.mean, self._m2)
        return self._m2 / self.count

    @property
    def mean_square(self) -> Tensor:
        """[channels] float64."""
        return self.variance + self.mean.square()
