"""The fit of one site: which ridge, whether to change anything at all, and the answer with all that is worth knowing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import inf, nan, sqrt

import torch
from torch import Tensor

from liar.errors import OptionError, Verdict
from liar.solve.solvers import Solved, solve
from liar.statistics import Normal

RIDGES = tuple(10.0**exponent for exponent in range(-5, 2))
# Outputs, or random combinations of them, on which ridges are compared.
SKETCH = 64


def check_ridge(ridge: float | str) -> None:
    """Raise an `OptionError` unless the ridge is a finite number >= 0."""
    if not isinstance(ridge, (int, float)) or not 0 <= ridge < inf:
        raise OptionError(f'ridge={ridge!r}: expected "auto" or a number >= 0 (relative to the mean diagonal of the Gram)')


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


def _held_out(
    splits: Sequence[tuple[Normal, Normal]], start: Tensor, bias: Tensor, ridge: float, solver: str
) -> tuple[float, float, float]:
    """Sums of squares on the held-out parts: without any update, with the bias alone, and with this ridge."""
    errors = torch.zeros(3, dtype=torch.float64, device=start.device)
    for fitted, held in splits:
        changed = start + solve(fitted, start, _absolute(ridge, fitted), solver).change
        moved = [fitted.mean_t - fitted.mean_z @ weight if fitted.affine else bias for weight in (start, changed)]
        errors += torch.cat([held.error(start, torch.stack([bias, moved[0]])), held.error(changed, moved[1])[None]])
    nothing, bias_only, updated = errors.tolist()
    return nothing, bias_only, updated


@dataclass(frozen=True)
class _Decision:
    """The relative ridge to use, infinite if the weights are to stay, and the held-out sums of squares it rests on."""

    ridge: float
    nothing: float
    bias_only: float
    updated: float


def _decide(splits: Sequence[tuple[Normal, Normal]], start: Tensor, bias: Tensor, ridge: float | str, solver: str) -> _Decision:
    """A ridge that was given as it is; with "auto" the best one, if it beats both ways of leaving the weights alone."""
    auto = ridge == "auto"
    chosen = float(ridge) if not auto else _best_ridge(splits, start, bias, solver) if splits else RIDGES[len(RIDGES) // 2]
    nothing, bias_only, updated = _held_out(splits, start, bias, chosen, solver)
    if auto and splits and updated >= min(nothing, bias_only):
        return _Decision(inf, nothing, bias_only, min(nothing, bias_only))
    return _Decision(chosen, nothing, bias_only, updated)


def _best_ridge(splits: Sequence[tuple[Normal, Normal]], start: Tensor, bias: Tensor, solver: str) -> float:
    """The ridge of `RIDGES` with the least error on the held-out parts, found by walking down from the middle.

    Ridges are compared on a few random combinations of the outputs: errors add up over outputs, and all outputs share the
    same Gram matrix, so a sketch ranks the ridges as the whole does at a fraction of the cost.
    """
    sketch = _sketch(start)
    nothing = torch.zeros(sketch.shape[1]).to(start)
    narrow = [(fitted.through(sketch, nothing), held.through(sketch, nothing)) for fitted, held in splits]

    @cache
    def error(index: int) -> float:
        if not 0 <= index < len(RIDGES):
            return inf
        return _held_out(narrow, start @ sketch, bias @ sketch, RIDGES[index], solver)[-1]

    index = len(RIDGES) // 2
    while (lower := min(index - 1, index + 1, key=error)) >= 0 and error(lower) < error(index):
        index = lower
    return RIDGES[index]


def _sketch(start: Tensor) -> Tensor:
    """Random combinations of the outputs of `start` [channels, out], of mean square 1: [out, at most `SKETCH`]."""
    out = start.shape[1]
    if out <= SKETCH:
        return torch.eye(out, dtype=start.dtype, device=start.device)
    made = torch.randn(out, SKETCH, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(start)
    return made.div_(sqrt(SKETCH))


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
    chosen = _decide(splits, start, bias, ridge, solver)
    if chosen.ridge == inf:
        solved = Solved(torch.zeros_like(start), len(start), nan)
    else:
        solved = solve(whole, start, _absolute(chosen.ridge, whole), solver)
    weight = start + solved.change
    moved = whole.affine and not (chosen.ridge == inf and chosen.nothing <= chosen.bias_only)
    held_power = sum(held.power for _, held in splits) or nan
    return Solution(
        weight=weight,
        bias=whole.mean_t - whole.mean_z @ weight if moved else bias,
        ridge=chosen.ridge,
        verdict=_verdict(whole.count, solved, chosen.ridge),
        rank=solved.rank,
        condition=solved.condition,
        power=whole.power / whole.total,
        before=chosen.nothing / held_power,
        after=chosen.updated / held_power,
    )


def fit_drift(
    whole: Normal,
    splits: Sequence[tuple[Normal, Normal]],
    weight: Tensor,
    bias: Tensor,
    *,
    ridge: float | str = "auto",
    solver: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Fit linear layers whose input has drifted to what they gave on the old input.

    One regression of the old input on the new one serves all outputs, so whether and how strongly to change is decided on a
    sketch of them; they stay as they were where no update is better on the held-out parts.

    Args:
        whole: normal equations of (new input, old input), all calibration tokens.
        splits: pairs (fitted on, held out), as in `fit`.
        weight: [in, out], of all layers side by side.
        bias: [out]; what is there stays there if the statistics are not affine.
        ridge: as in `fit`.
        solver: as in `fit`.

    Returns:
        The new weight and bias.
    """
    sketch = _sketch(weight)
    narrow, offset = weight @ sketch, bias @ sketch
    parts = [(fitted.through(narrow, offset), held.through(narrow, offset)) for fitted, held in splits]
    chosen = _decide(parts, narrow, offset, ridge, solver).ridge
    if chosen == inf:
        return weight, bias
    target = whole.through(weight, bias)
    changed = weight + solve(target, weight, _absolute(chosen, target), solver).change
    return changed, target.mean_t - target.mean_z @ changed if whole.affine else bias


def _verdict(tokens: int, solved: Solved, ridge: float) -> Verdict:
    channels = len(solved.change)
    if not channels:
        return Verdict.DROPPED
    if ridge == inf:
        return Verdict.KEPT_BASELINE
    if tokens <= channels:
        return Verdict.TOO_FEW_TOKENS
    if ridge == 0 and solved.rank < channels:
        return Verdict.RANK_DEFICIENT
    return Verdict.RIDGED if ridge else Verdict.OK
