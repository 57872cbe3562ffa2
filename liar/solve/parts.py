"""The fit of a target in two parts: what the layer gives with all its units, and what drift adds; each with its own ridge.

The first part is nearly a function of the kept channels, and a weak ridge serves it well. The second is what the stream has
lost before the layer. The kept channels say little about it, and what they say on one kind of text holds for that kind only: it
needs a strong ridge. With one ridge for the sum of both, the one for drift is that of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf

import torch
from torch import Tensor

from liar.solve.fit import Solution, fit
from liar.solve.ridge import MIDDLE, Split, absolute
from liar.solve.solvers import solve
from liar.statistics import Normal
from liar.verdicts import Verdict


def fit_in_parts(
    all_data: Normal,
    splits: Sequence[Split],
    weight: Tensor,
    bias: Tensor,
    *,
    drift_ridge: float,
    ridge: float | str = "auto",
    solver: str = "auto",
    enough: bool = True,
    start: float = MIDDLE,
) -> Solution:
    """Fit one site to its own output, with a ridge toward the kept weights, and to the rest, with a ridge toward zero.

    Args:
        all_data: as for `fit`, with a target of [2 out] columns: the layer's own output, then the whole target.
        splits: as for `fit`, with the same columns.
        weight: as for `fit`.
        bias: as for `fit`.
        drift_ridge: relative ridge of the rest: of the whole target less the own output.
        ridge: as in `fit`, for the own output.
        solver: as for `fit`.
        enough: as for `fit`.
        start: as for `fit`.

    Returns:
        A `Solution` with the errors of the whole target. With `ridge="auto"` the weights stay as they are where nothing can be
        compared, and where both parts together are no better for the whole target on the held-out parts.

    Example:
        >>> z, drift = torch.randn(2, 400, 6, dtype=torch.float64)
        >>> moments = liar.statistics.Moments()
        >>> moments.update(z, torch.cat([z, z + drift], 1))
        >>> no_weight, no_bias = torch.zeros(6, 6), torch.zeros(6)
        >>> fit_in_parts(moments.normal(affine=False), [], no_weight, no_bias, ridge=0.0, drift_ridge=1.0).weight.shape
        torch.Size([6, 6])
    """
    weight, bias = weight.double(), bias.double()
    out = weight.shape[1]
    own, whole = slice(0, out), slice(out, None)
    parts = [(fitted.columns(own), held.columns(own)) for fitted, held in splits]
    solution = fit(all_data.columns(own), parts, weight, bias, ridge=ridge, solver=solver, enough=enough, start=start)
    is_guarded = ridge == "auto"
    if is_guarded and not (splits and enough):
        return solution

    def with_drift(rows: Normal, fitted: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias from some rows, given the weight that is fitted to their own output."""
        target = rows.columns(whole)
        changed = fitted + _change(target.less(rows.columns(own)), torch.zeros_like(weight), drift_ridge, solver)
        return changed, target.mean_t - target.mean_z @ changed if rows.affine else bias

    held_out = []
    for fitted, held in splits:
        own_weight = weight + _change(fitted.columns(own), weight, solution.ridge, solver)
        held_out.append((with_drift(fitted, own_weight), held.columns(whole)))
    energy = sum(held.target_energy for _, held in held_out)
    unchanged = sum(float(held.error(weight, bias)) for _, held in held_out)
    updated = sum(float(held.error(*answer)) for answer, held in held_out)
    if is_guarded and not updated < unchanged:
        kept = replace(solution, weight=weight, bias=bias, ridge=inf, verdict=Verdict.KEPT_BASELINE)
        return replace(kept, before=unchanged / energy, after=unchanged / energy)
    changed, offset = with_drift(all_data, solution.weight)
    return replace(
        solution,
        weight=changed,
        bias=offset,
        ridge=min(solution.ridge, drift_ridge),
        verdict=Verdict.RIDGED if solution.verdict is Verdict.KEPT_BASELINE else solution.verdict,
        target_energy=all_data.columns(whole).target_energy / all_data.weight_sum,
        before=unchanged / energy if energy else solution.before,
        after=updated / energy if energy else solution.after,
    )


def _change(normal: Normal, weight: Tensor, ridge: float, solver: str) -> Tensor:
    """What a relative ridge, toward a weight, makes of it; an infinite one nothing."""
    return torch.zeros_like(weight) if ridge == inf else solve(normal, weight, absolute(ridge, normal), solver).change
