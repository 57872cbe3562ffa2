"""Solvers for one set of normal equations, batched over ridges: `(G + ridge) D = rest`. Tensors only, all in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from liar.solve.precision import is_refined, solve_refined
from liar.statistics import Normal


@dataclass(frozen=True)
class Solved:
    """The answer of one solver: change [*, channels, out], and what it saw of the Gram matrix."""

    change: Tensor
    rank: int
    condition: float


def cholesky(normal: Normal, rest: Tensor, ridges: Tensor) -> Solved | None:
    """Solve `(G + ridge) D = rest` for every absolute ridge [*]; None where a factorisation fails."""
    largest = 1 / normal.rank_tolerance
    if is_refined(normal.gram, rest.shape[-1]) and (refined := solve_refined(normal.spectrum.damped(ridges), rest)):
        change, diagonal = refined
        condition = _condition(diagonal)
        return Solved(change, len(normal.gram), condition) if condition < largest else None
    factor, info = normal.spectrum.cholesky(ridges)
    condition = _condition(factor.diagonal(dim1=-2, dim2=-1))
    if bool((info != 0).any()) or not condition < largest:
        return None
    # Faster than cholesky_solve, which copies the factor.
    half = torch.linalg.solve_triangular(factor, rest, upper=False)
    return Solved(torch.linalg.solve_triangular(factor.mT, half, upper=True), len(normal.gram), condition)


def _condition(diagonal: Tensor) -> float:
    """A lower bound of the condition of matrices, from the diagonals of their Cholesky factors [*, channels]: the largest."""
    return float((diagonal.amax(-1) / diagonal.amin(-1)).square().max())


def eigh(normal: Normal, rest: Tensor, ridges: Tensor) -> Solved:
    """The same from one eigendecomposition, for every ridge; null directions get no change (the minimum norm)."""
    values, vectors = normal.spectrum.eigen
    largest = values[-1].clamp_min(torch.finfo(values.dtype).tiny)
    live = values > normal.rank_tolerance * largest
    damped = torch.where(live, 1 / (values.clamp_min(0) + ridges[..., None]).where(live, torch.ones_like(values)), 0.0)
    lowest = values[live].min() if bool(live.any()) else largest
    condition = ((largest + ridges) / (lowest + ridges)).max()
    change = vectors @ (damped[..., None] * (vectors.T @ rest))
    return Solved(change, int(live.sum()), float(condition))


def lstsq(normal: Normal, weight: Tensor, ridges: Tensor) -> Solved:
    """The same through `torch.linalg.lstsq` on the streamed R factor: rows [R; sqrt(ridge) 1], batched over ridges.

    Runs on the CPU, where the driver (`gelsd`) gives the minimum norm for dependent columns.
    """
    assert normal.factor is not None
    z, t = (part.cpu() for part in normal.factor)
    ridges = ridges.cpu()
    batch, channels = ridges.shape, z.shape[1]
    damp = ridges.sqrt()[..., None, None] * torch.eye(channels).to(z)
    left = torch.cat([z.expand(*batch, *z.shape), damp], -2)
    right = (t - z @ weight.cpu()).expand(*batch, -1, -1)
    right = torch.cat([right, right.new_zeros(*batch, channels, right.shape[-1])], -2)
    solution = torch.linalg.lstsq(left, right, rcond=normal.rank_tolerance**0.5, driver="gelsd").solution
    singular = torch.linalg.svdvals(z)
    largest = singular.max().clamp_min(torch.finfo(singular.dtype).tiny)
    live = singular > normal.rank_tolerance**0.5 * largest
    lowest = singular[live].min() if bool(live.any()) else largest
    condition = ((largest.square() + ridges) / (lowest.square() + ridges)).max()
    return Solved(solution.to(weight.device), int(live.sum()), float(condition))


def solve(normal: Normal, weight: Tensor, ridges: Tensor, solver: str, *, rest: Tensor | None = None) -> Solved:
    """The change of `weight` [channels, out] for every absolute ridge [*], by the named solver.

    `rest` is `cross - gram weight`, where it is known.

    `auto` and `cholesky` try a Cholesky factorisation and turn to `eigh` when the Gram matrix is numerically singular;
    `Solved.rank` then tells. `lstsq` needs a `Normal` that was streamed as a `Factor`.
    """
    if solver == "lstsq":
        return lstsq(normal, weight, ridges)
    if rest is None:
        rest = normal.rest(weight)
    # With few rows the matrix is singular, and its eigenvectors cost less than a factorisation.
    solved = None if solver == "eigh" or normal.spectrum.is_thin else cholesky(normal, rest, ridges)
    return solved or eigh(normal, rest, ridges)
