"""The mean of two fits of one target: as a whole with one ridge, and in two parts, each with a ridge of its own.

The first part is what the layer would give on the pruned stream with all its units. It is nearly a function of the kept
channels, and a weak ridge serves it well. The second is what the stream has lost before the layer. The kept channels say little
about it, and what they say on one kind of text holds for that kind only: it needs a strong ridge. With one ridge for the sum of
both, the one for drift is that of both, and the first part is fitted worse than it could be; with two, what the channels do say
about the drift is lost. docs/choosing.md has what their mean gives, beside the fit with one ridge.
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

# Weight of the fit of the whole target in the mean.
WHOLE = 0.5


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
    """Fit one site to its whole target, and to the two parts of it, and take the mean of both answers.

    Of the parts, the layer's own output has a ridge toward the kept weights, and the rest a ridge toward zero.

    Args:
        all_data: as for `fit`, with a target of [2 out] columns: the layer's own output, then the whole target.
        splits: as for `fit`, with the same columns.
        weight: as for `fit`.
        bias: as for `fit`.
        drift_ridge: relative ridge of the rest: of the whole target less the own output.
        ridge: as in `fit`, for the own output, and for the whole target; `"auto"` chooses twice.
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
    own_fit, whole_fit = (
        fit(
            all_data.columns(part),
            [(fitted.columns(part), held.columns(part)) for fitted, held in splits],
            weight,
            bias,
            ridge=ridge,
            solver=solver,
            enough=enough,
            start=start,
        )
        for part in (own, whole)
    )
    is_guarded = ridge == "auto"
    if is_guarded and not (splits and enough):
        return whole_fit

    def mean(rows: Normal, own_weight: Tensor, whole_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias, given what both fits made of these rows."""
        target = rows.columns(whole)
        drift = _change(target.less(rows.columns(own)), torch.zeros_like(weight), drift_ridge, solver)
        changed = torch.lerp(own_weight + drift, whole_weight, WHOLE)
        return changed, target.mean_t - target.mean_z @ changed if rows.affine else bias

    held_out = []
    for fitted, held in splits:
        own_weight, whole_weight = (
            weight + _change(fitted.columns(part), weight, solution.ridge, solver)
            for part, solution in ((own, own_fit), (whole, whole_fit))
        )
        held_out.append((mean(fitted, own_weight, whole_weight), held.columns(whole)))
    energy = sum(held.target_energy for _, held in held_out)
    unchanged = sum(float(held.error(weight, bias)) for _, held in held_out)
    if is_guarded and not energy > 0:
        return whole_fit
    updated = sum(float(held.error(*answer)) for answer, held in held_out)
    if is_guarded and not updated < unchanged:
        kept = replace(whole_fit, weight=weight, bias=bias, ridge=inf, verdict=Verdict.KEPT_BASELINE)
        return replace(kept, before=unchanged / energy, after=unchanged / energy)
    changed, offset = mean(all_data, own_fit.weight, whole_fit.weight)
    return replace(
        whole_fit,
        weight=changed,
        bias=offset,
        ridge=min(own_fit.ridge, whole_fit.ridge, drift_ridge),
        verdict=Verdict.RIDGED if whole_fit.verdict is Verdict.KEPT_BASELINE else whole_fit.verdict,
        before=unchanged / energy if energy else whole_fit.before,
        after=updated / energy if energy else whole_fit.after,
    )


def _change(normal: Normal, weight: Tensor, ridge: float, solver: str) -> Tensor:
    """What a relative ridge, toward a weight, makes of it; an infinite one nothing."""
    return torch.zeros_like(weight) if ridge == inf else solve(normal, weight, absolute(ridge, normal), solver).change
