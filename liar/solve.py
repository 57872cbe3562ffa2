"""Least squares for one site: how the kept channels can stand in for what is missing. Tensors only, all in float64.

The unknown is the change `D = V - W_0` of the kept weights (W_0: what stays in place if nothing is done):

    minimise |t - z V - 1 b|^2 + ridge |V - W_0|^2        (our reading of LIAR with a ridge toward the kept weights)

A ridge is relative: the number is multiplied by the mean diagonal of the Gram matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import inf, nan

import torch
from torch import Tensor

from liar.errors import OptionError, Verdict
from liar.statistics import Normal

SOLVERS = ("auto", "cholesky", "eigh", "lstsq")
RIDGES = tuple(10.0**exponent for exponent in range(-5, 2))
# Outputs, or random combinations of them, on which ridges are compared.
SKETCH = 64


def check_ridge(ridge: float | str) -> None:
    """Raise an `OptionError` unless the ridge is a finite number >= 0."""
    if not isinstance(ridge, (int, float)) or not 0 <= ridge < inf:
        raise OptionError(f'ridge={ridge!r}: expected "auto" or a number >= 0 (relative to the mean diagonal of the Gram)')


@dataclass(frozen=True)
class Solved:
    """The answer of one solver: change [*, channels, out], and what it saw of the Gram matrix."""

    change: Tensor
    rank: int
    condition: float


@dataclass(frozen=True)
class Solution:
    """New weights of the consumer's kept channels, with everything worth knowing about how they came about.

    Attributes:
        weight: [kept channels, out], float64.
        bias: [out], float64.
        ridge: relative ridge used; infinite if the kept weights stayed as they were.
        verdict: how it ended.
        rank: numerical rank of the kept channels.
        condition: of the Gram matrix with its ridge; from `cholesky` a lower bound (squared ratio of the diagonal of L).
        power: sum of squares of the (centred) target per token.
        before: residual energy without any update, over `power`, on held-out tokens.
        after: the same for a solution fitted without those tokens.
    """

    weight: Tensor
    bias: Tensor
    ridge: float
    verdict: Verdict
    rank: int
    condition: float
    power: float
    before: float
    after: float


def cholesky(normal: Normal, rest: Tensor, ridges: Tensor) -> Solved | None:
    """Solve `(G + ridge) D = rest` for every absolute ridge [*]; None where a factorisation fails."""
    damped = normal.gram + ridges[..., None, None] * torch.eye(len(normal.gram)).to(normal.gram)
    factor, info = torch.linalg.cholesky_ex(damped)
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    condition = (diagonal.amax(-1) / diagonal.amin(-1)).square().max()
    if bool((info != 0).any()) or not condition < 1 / normal.noise:
        return None
    return Solved(torch.cholesky_solve(rest, factor), len(normal.gram), float(condition))


def eigh(normal: Normal, rest: Tensor, ridges: Tensor) -> Solved:
    """The same from one eigendecomposition, for every ridge; null directions get no change (the minimum norm)."""
    values, vectors = torch.linalg.eigh(normal.gram)
    largest = values[-1].clamp_min(torch.finfo(values.dtype).tiny)
    live = values > normal.noise * largest
    damped = torch.where(live, 1 / (values.clamp_min(0) + ridges[..., None]).where(live, torch.ones_like(values)), 0.0)
    lowest = values[live].min() if bool(live.any()) else largest
    condition = ((largest + ridges) / (lowest + ridges)).max()
    change = vectors @ (damped[..., None] * (vectors.T @ rest))
    return Solved(change, int(live.sum()), float(condition))


def lstsq(normal: Normal, start: Tensor, ridges: Tensor) -> Solved:
    """The same through `torch.linalg.lstsq` on the streamed R factor: rows [R; sqrt(ridge) 1], batched over ridges.

    Runs on the CPU, where the driver (`gelsd`) gives the minimum norm for dependent columns.
    """
    assert normal.factor is not None
    z, t = (part.cpu() for part in normal.factor)
    ridges = ridges.cpu()
    batch, channels = ridges.shape, z.shape[1]
    damp = ridges.sqrt()[..., None, None] * torch.eye(channels).to(z)
    left = torch.cat([z.expand(*batch, *z.shape), damp], -2)
    right = (t - z @ start.cpu()).expand(*batch, -1, -1)
    right = torch.cat([right, right.new_zeros(*batch, channels, right.shape[-1])], -2)
    found = torch.linalg.lstsq(left, right, rcond=normal.noise**0.5, driver="gelsd").solution
    singular = torch.linalg.svdvals(z)
    largest = singular.max().clamp_min(torch.finfo(singular.dtype).tiny)
    live = singular > normal.noise**0.5 * largest
    lowest = singular[live].min() if bool(live.any()) else largest
    condition = ((largest.square() + ridges) / (lowest.square() + ridges)).max()
    return Solved(found.to(start.device), int(live.sum()), float(condition))


def solve(normal: Normal, start: Tensor, ridges: Tensor, solver: str) -> Solved:
    """The change of `start` [channels, out] for every absolute ridge [*], by the named solver.

    `auto` and `cholesky` try a Cholesky factorisation and turn to `eigh` when the Gram matrix is numerically singular;
    `Solved.rank` then tells. `lstsq` needs a `Normal` that was streamed as a `Factor`.
    """
    if solver == "lstsq":
        return lstsq(normal, start, ridges)
    rest = normal.cross - normal.gram @ start
    found = None if solver == "eigh" else cholesky(normal, rest, ridges)
    return found or eigh(normal, rest, ridges)


def _held_out(
    splits: Sequence[tuple[Normal, Normal]], start: Tensor, bias: Tensor, ridge: float, solver: str
) -> tuple[float, float, float]:
    """Sums of squares on the held-out parts: without any update, with the bias alone, and with this ridge."""
    errors = torch.zeros(3, dtype=torch.float64, device=start.device)
    for fitted, held in splits:
        changed = start + solve(fitted, start, _absolute(ridge, fitted), solver).change
        weights = torch.stack([start, start, changed])
        biases = bias.expand(3, -1)
        if fitted.affine:
            biases = torch.cat([bias[None], fitted.mean_t - fitted.mean_z @ weights[1:]])
        errors += held.error(weights, biases)
    nothing, bias_only, updated = errors.tolist()
    return nothing, bias_only, updated


def _best_ridge(splits: Sequence[tuple[Normal, Normal]], start: Tensor, bias: Tensor, solver: str) -> float:
    """The ridge of `RIDGES` with the least error on the held-out parts, found by walking down from the middle.

    Ridges are compared on a few random combinations of the outputs: errors add up over outputs, and all outputs share the
    same Gram matrix, so a sketch ranks the ridges as the whole does at a fraction of the cost.
    """
    sketch = torch.eye(start.shape[1]).to(start)
    if start.shape[1] > SKETCH:
        generator = torch.Generator().manual_seed(0)
        sketch = torch.randn(start.shape[1], SKETCH, generator=generator, dtype=torch.float64).to(start) / SKETCH**0.5
    narrow = [(_sketched(fitted, sketch), _sketched(held, sketch)) for fitted, held in splits]

    @cache
    def error(index: int) -> float:
        if not 0 <= index < len(RIDGES):
            return inf
        return _held_out(narrow, start @ sketch, bias @ sketch, RIDGES[index], solver)[-1]

    index = len(RIDGES) // 2
    while (lower := min(index - 1, index + 1, key=error)) >= 0 and error(lower) < error(index):
        index = lower
    return RIDGES[index]


def _sketched(normal: Normal, sketch: Tensor) -> Normal:
    """The normal equations for combinations of the outputs; their power is left out, it is the same for every weight."""
    factor = normal.factor and (normal.factor[0], normal.factor[1] @ sketch)
    return replace(normal, cross=normal.cross @ sketch, mean_t=normal.mean_t @ sketch, power=0.0, factor=factor)


def _absolute(ridge: float, normal: Normal) -> Tensor:
    return torch.tensor(ridge * normal.scale, dtype=torch.float64, device=normal.gram.device)


def fit(
    whole: Normal,
    splits: Sequence[tuple[Normal, Normal]],
    start: Tensor,
    bias: Tensor,
    *,
    ridge: float | str = "auto",
    solver: str = "auto",
) -> Solution:
    """Fit one site.

    Args:
        whole: normal equations of all calibration tokens.
        splits: pairs (fitted on, held out) of disjoint parts of the calibration sequences; may be empty, then nothing
            is validated and `ridge="auto"` takes the middle of `RIDGES`.
        start: [kept channels, out], the consumer's kept weights (transposed).
        bias: [out], the consumer's bias (zeros where it has none and none is created).
        ridge: relative ridge, or "auto": the one with the least error on the held-out parts; if keeping the weights, with
            or without moving the bias, is better there, that is done.
        solver: one of `SOLVERS`.
    """
    start, bias = start.double(), bias.double()
    auto = ridge == "auto"
    chosen = float(ridge) if not auto else _best_ridge(splits, start, bias, solver) if splits else RIDGES[len(RIDGES) // 2]
    nothing, bias_only, updated = _held_out(splits, start, bias, chosen, solver)
    guarded = auto and bool(splits) and updated >= min(nothing, bias_only)
    if guarded:
        chosen, updated = inf, min(nothing, bias_only)
        solved = Solved(torch.zeros_like(start), len(start), nan)
    else:
        solved = solve(whole, start, _absolute(chosen, whole), solver)
    weight = start + solved.change
    moved = whole.affine and not (guarded and nothing <= bias_only)
    held_power = sum(held.power for _, held in splits) or nan
    return Solution(
        weight=weight,
        bias=whole.mean_t - whole.mean_z @ weight if moved else bias,
        ridge=chosen,
        verdict=_verdict(whole.count, solved, chosen),
        rank=solved.rank,
        condition=solved.condition,
        power=whole.power / whole.count,
        before=nothing / held_power,
        after=updated / held_power,
    )


def _verdict(tokens: int, solved: Solved, ridge: float) -> Verdict:
    channels = len(solved.change)
    if ridge == inf:
        return Verdict.KEPT_BASELINE
    if tokens <= channels:
        return Verdict.TOO_FEW_TOKENS
    if ridge == 0 and solved.rank < channels:
        return Verdict.RANK_DEFICIENT
    return Verdict.RIDGED if ridge else Verdict.OK
