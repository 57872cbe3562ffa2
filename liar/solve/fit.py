"""The fit of one site: the answer, with everything worth knowing about how it came about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, nan

import torch
from torch import Tensor

from liar.solve.ridge import MIDDLE, Split, absolute, decide, sketch_of
from liar.solve.solvers import Solved, solve
from liar.statistics import Normal
from liar.verdicts import Verdict


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
        target_energy: sum of squares of the (centred) target per token.
        before: residual energy without any update, over the target's, on held-out tokens.
        after: the same for a solution fitted without those tokens.

    Example:
        >>> from liar.statistics import Moments
        >>> moments = Moments()
        >>> moments.update(torch.eye(3).repeat(9, 1), torch.ones(27, 1))
        >>> solution = fit(moments.normal(affine=True), [], torch.zeros(3, 1), torch.zeros(1), ridge=1.0)
        >>> solution.verdict.value, solution.rank, solution.bias
        ('ridged', 3, tensor([1.], dtype=torch.float64))
    """

    weight: Tensor
    bias: Tensor
    ridge: float
    verdict: Verdict
    rank: int
    condition: float
    target_energy: float
    before: float
    after: float


def fit(
    all_data: Normal,
    splits: Sequence[Split],
    weight: Tensor,
    bias: Tensor,
    *,
    ridge: float | str = "auto",
    solver: str = "auto",
    enough: bool = True,
    start: float = MIDDLE,
) -> Solution:
    """Fit one site.

    Args:
        all_data: normal equations of all calibration tokens.
        splits: pairs (fitted on, held out) of disjoint parts of the calibration sequences, together all of them; may be
            empty, then nothing can be validated and `ridge="auto"` leaves the weights as they are, as it does with too few
            tokens.
        weight: [kept channels, out], the consumer's kept weights (transposed).
        bias: [out], the consumer's bias (zeros where it has none and none is created).
        ridge: relative ridge, or "auto": the one with the least error on the held-out parts; if keeping the weights, with
            or without moving the bias, is better there, they are kept.
        solver: one of the solvers.
        enough: False if there is too little data to change anything by it; see `RepairContext.is_enough`.
        start: the ridge at which the search for "auto" begins.

    Example:
        >>> from liar.statistics import Moments
        >>> z = torch.randn(500, 4, dtype=torch.float64)
        >>> moments = Moments()
        >>> moments.update(z, z @ torch.ones(4, 2, dtype=torch.float64) + 3)
        >>> solution = fit(moments.normal(affine=True), [], torch.zeros(4, 2), torch.zeros(2), ridge=0)
        >>> solution.weight.round(decimals=6).unique(), solution.bias.round(decimals=6).unique()
        (tensor([1.], dtype=torch.float64), tensor([3.], dtype=torch.float64))
    """
    weight, bias = weight.double(), bias.double()
    held_energy = sum(held.target_energy for _, held in splits)
    # A target that is nothing, or beyond all bounds, says nothing about an update.
    splits = splits if 0 < held_energy < inf else []
    decision = decide(splits, weight, bias, ridge, solver, enough=enough, start=start)
    if decision.ridge == inf:
        solved = Solved(torch.zeros_like(weight), len(weight), nan)
    else:
        solved = solve(all_data, weight, absolute(decision.ridge, all_data), solver, rest=decision.rest)
    changed = weight + solved.change
    moved = all_data.affine and (decision.ridge != inf or decision.bias_only < decision.unchanged)
    held_energy = held_energy if splits else nan
    return Solution(
        weight=changed,
        bias=all_data.mean_t - all_data.mean_z @ changed if moved else bias,
        ridge=decision.ridge,
        verdict=_verdict(all_data.count, solved, decision.ridge, held_out=bool(splits), enough=enough),
        rank=solved.rank,
        condition=solved.condition,
        target_energy=all_data.target_energy / all_data.weight_sum,
        before=decision.unchanged / held_energy,
        after=decision.updated / held_energy,
    )


def fit_drift(
    all_data: Normal,
    splits: Sequence[Split],
    weight: Tensor,
    bias: Tensor,
    *,
    ridge: float | str = "auto",
    solver: str = "auto",
    enough: bool = True,
) -> tuple[Tensor, Tensor]:
    """Fit linear layers whose input has drifted to what they gave on the old input.

    One regression of the old input on the new one serves all outputs, so whether and how strongly to change is decided on a
    sketch of them; they stay as they were where no update is better on the held-out parts.

    Args:
        all_data: normal equations of (new input, old input), all calibration tokens.
        splits: pairs (fitted on, held out), as in `fit`.
        weight: [in, out], of all layers side by side.
        bias: [out]; it stays as it is if the statistics are not affine.
        ridge: as in `fit`.
        solver: as in `fit`.
        enough: as in `fit`.

    Returns:
        The new weight and bias.
    """
    sketch = sketch_of(weight)
    narrow, offset = weight @ sketch, bias @ sketch
    parts = [(fitted.project_targets(narrow, offset), held.project_targets(narrow, offset)) for fitted, held in splits]
    chosen = decide(parts, narrow, offset, ridge, solver, enough=enough).ridge
    if chosen == inf:
        return weight, bias
    target = all_data.project_targets(weight, bias) if solver == "lstsq" else all_data
    # Of the projected target: its cross moments less the Gram matrix, times the weight, in one product.
    rest = (all_data.cross - all_data.gram) @ weight
    changed = weight + solve(target, weight, absolute(chosen, all_data), solver, rest=rest).change
    return changed, all_data.mean_t @ weight + bias - all_data.mean_z @ changed if all_data.affine else bias


def _verdict(tokens: int, solved: Solved, ridge: float, *, held_out: bool, enough: bool) -> Verdict:
    channels = len(solved.change)
    if ridge == inf and not held_out:
        return Verdict.NOTHING_HELD_OUT
    if ridge == inf and enough:
        return Verdict.KEPT_BASELINE
    if tokens <= channels or not enough:
        return Verdict.TOO_FEW_TOKENS
    if ridge == 0 and solved.rank < channels:
        return Verdict.RANK_DEFICIENT
    return Verdict.RIDGED if ridge else Verdict.OK
