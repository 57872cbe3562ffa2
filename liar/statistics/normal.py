"""The frozen answer of the statistics: normal equations of one least-squares problem."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from scipy.linalg.lapack import dpstrf
from torch import Tensor

from liar.errors import CalibrationError

_NOT_FINITE = (
    "NaN or Inf in the {}. Check the model on this data: a float16 model may overflow (use bfloat16 or float32), or "
    "its weights may be damaged"
)
NO_ROWS = "no calibration token reached the layer"


def check_finite(*values: Tensor, what: str = "activations") -> None:
    """Raise a `CalibrationError` that says of what if any value is NaN or infinite."""
    if not all(bool(torch.isfinite(value).all()) for value in values):
        raise CalibrationError(_NOT_FINITE.format(what))


# Cholesky factors that are kept of matrices with at most so many channels: a search for a ridge ends one or two steps after the
# best, whose factor is wanted again.
KEPT = 3
KEPT_CHANNELS = 2_048


class Spectrum:
    """Decompositions of a Gram matrix, computed when they are first asked for.

    Args:
        gram: [channels, channels], positive semidefinite.
        rows: how many it is the Gram matrix of; its rank is not larger.
    """

    def __init__(self, gram: Tensor, rows: int) -> None:
        self._gram, self._rows = gram, rows
        self._factors: dict[float, tuple[Tensor, Tensor]] = {}
        self.is_thin = 2 * rows < len(gram)

    def damped(self, ridges: Tensor) -> Tensor:
        """The matrix with every absolute ridge [*] on its diagonal: [*, channels, channels]."""
        matrix = self._gram.expand(*ridges.shape, *self._gram.shape).clone()
        matrix.diagonal(dim1=-2, dim2=-1).add_(ridges[..., None])
        return matrix

    def cholesky(self, ridges: Tensor) -> tuple[Tensor, Tensor]:
        """The factor of each of these matrices, and 0 where there is one, as `torch.linalg.cholesky_ex` gives them."""
        if ridges.ndim or len(self._gram) > KEPT_CHANNELS:
            return tuple(torch.linalg.cholesky_ex(self.damped(ridges)))
        ridge = float(ridges)
        found = self._factors.pop(ridge, None) or tuple(torch.linalg.cholesky_ex(self.damped(ridges)))
        self._factors[ridge] = found
        while len(self._factors) > KEPT:
            del self._factors[next(iter(self._factors))]
        return found

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Ascending eigenvalues [n], eigenvectors in columns [channels, n]; without null directions where rows are few."""
        if not self.is_thin:
            values, vectors = torch.linalg.eigh(self._gram)
            return values, vectors
        # Pivots of a Cholesky factorisation come in descending order; after as many as there are rows the rest is rounding.
        factor, pivots, rank, _ = dpstrf(self._gram.cpu().numpy(), lower=1)
        root = torch.from_numpy(np.tril(factor)[:, : max(min(rank, self._rows), 1)])
        root = torch.empty_like(root).index_copy_(0, torch.from_numpy(pivots).long() - 1, root).to(self._gram)
        left, singular, _ = torch.linalg.svd(root, full_matrices=False)
        return singular.square().flip(0), left.flip(1)


@dataclass(frozen=True)
class Normal:
    """Normal equations of `min |t - z V - 1 b|^2`, all float64; the frozen answer of `Moments` and `Factor`.

    Attributes:
        count: number of rows (tokens).
        weight_sum: sum of the rows' weights (their number where they have none); all sums below are weighted.
        gram: [channels, channels], `z' z` (centred if `affine`).
        cross: [channels, out], `z' t` (centred if `affine`).
        target_energies: [out], sum of squares of every column of t (centred if `affine`).
        mean_z: [channels]; zero if not `affine`.
        mean_t: [out]; zero if not `affine`.
        affine: whether an intercept is part of the model.
        rank_tolerance: share of the largest eigenvalue of the Gram matrix below which a direction is rounding error.
        factor: R of the QR decomposition of z and the rotated t, ([channels, channels], [channels, out]), where it was
            streamed (`Factor`).
    """

    count: int
    weight_sum: float
    gram: Tensor
    cross: Tensor
    target_energies: Tensor
    mean_z: Tensor
    mean_t: Tensor
    affine: bool
    rank_tolerance: float
    factor: tuple[Tensor, Tensor] | None = None

    @cached_property
    def spectrum(self) -> Spectrum:
        """Of `gram`; all normal equations that are made of these have it too, and all ridges use it."""
        return Spectrum(self.gram, self.count)

    @property
    def target_energy(self) -> float:
        """Sum of squares of t."""
        return float(self.target_energies.sum())

    @property
    def scale(self) -> float:
        """Mean diagonal of the Gram matrix: the unit of a relative ridge."""
        return float(self.gram.diagonal().mean())

    def project_targets(self, weight: Tensor, bias: Tensor) -> Normal:
        """The same rows with the target `t weight + bias` instead of t: weight [out, new out], bias [new out].

        The energy of the new target is not known from these sums and left out (0): errors are then all smaller by it.
        """
        projected = replace(
            self,
            cross=self.cross @ weight,
            mean_t=self.mean_t @ weight + bias if self.affine else self.mean_t @ weight,
            target_energies=self.target_energies.new_zeros(weight.shape[1]),
            factor=self.factor and (self.factor[0], self.factor[1] @ weight),
        )
        return self._share_spectrum(projected)

    def columns(self, part: slice) -> Normal:
        """The same rows with some columns of the target alone."""
        chosen = replace(
            self,
            cross=self.cross[:, part],
            mean_t=self.mean_t[part],
            target_energies=self.target_energies[part],
            factor=self.factor and (self.factor[0], self.factor[1][:, part]),
        )
        return self._share_spectrum(chosen)

    def less(self, other: Normal) -> Normal:
        """The same rows with the target t less that of `other`, which has the same rows.

        The energy of the difference is not known from these sums and left out, as in `project_targets`.
        """
        difference = replace(
            self,
            cross=self.cross - other.cross,
            mean_t=self.mean_t - other.mean_t,
            target_energies=torch.zeros_like(self.target_energies),
            factor=self.factor and other.factor and (self.factor[0], self.factor[1] - other.factor[1]),
        )
        return self._share_spectrum(difference)

    def shifted(self, by: Tensor) -> Normal:
        """The same rows with the target `t + by`, [out]; without an intercept no mean is known, and `by` has to be zero."""
        return self._share_spectrum(replace(self, mean_t=self.mean_t + by))

    def _share_spectrum(self, other: Normal) -> Normal:
        vars(other)["spectrum"] = self.spectrum
        return other

    def rest(self, weight: Tensor) -> Tensor:
        """What a weight [channels, out] leaves of the cross moments: `cross - gram weight`, zero where it fits best."""
        return self.cross - self.gram @ weight

    def error(self, weight: Tensor, bias: Tensor, rest: Tensor | None = None) -> Tensor:
        """Sum of squares of `t - z weight - bias` over these rows: weight [*, channels, out], bias [*, out] -> [*].

        `rest` is what `rest` gives for the weight, where it is known.

        Without an intercept (`affine` False) no sums of rows were kept: it is exact for a bias of zero only.
        """
        rest = self.rest(weight) if rest is None else rest
        quadratic = -(weight * (rest + self.cross)).sum((-2, -1))
        offset = self.mean_t - self.mean_z @ weight - bias
        return quadratic + self.target_energies.sum() + self.weight_sum * offset.square().sum(-1)
