"""The fit of a layer's own output, and of a damped part of what the residual stream has lost before the layer.

What a layer gives with all its units is nearly a function of the kept channels. What the stream has lost before it is not: the
channels say little about it, and what they say on one text need not hold on another. Where they say much, in the directions in
which they are large, it pays to make up for it; elsewhere less of it is better (docs/choosing.md, "How much of the drift").
Where the consumer has a bias, the mean of its output stays that of the layer's own: what the stream has lost on average belongs
to the text as well, and to make up for it moves all outputs alike.
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

# So much of the drift has the ridge of the own output; of the whole drift, so much is added with a strong ridge of its own.
SHARE = 0.3
DAMPED_SHARE = 0.5
DAMPING = 1.0


def damped_target(own: Tensor, whole: Tensor) -> Tensor:
    """The target of `fit_damped`: the part that is fitted, beside the whole. [..., out] each -> [..., 2 out].

    Args:
        own: what the layer gives with all its units.
        whole: what it would have to give so that the stream after it is the dense model's.
    """
    return torch.cat([torch.lerp(own, whole, SHARE), whole], -1)


def fit_damped(
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
    """Fit one site to its own output and a share of the drift, and add what a strong ridge makes of the drift.

    Args:
        all_data: as for `fit`, with a target from `damped_target`.
        splits: as for `fit`, with the same target.
        weight: as for `fit`.
        bias: as for `fit`.
        ridge: as for `fit`.
        solver: as for `fit`.
        enough: as for `fit`.
        start: as for `fit`.

    Returns:
        The `Solution` of the first part, with the weights and the bias of both. Where the first part is best left as it was,
        the drift is left, too, and so are both where the whole is nothing, or beyond all bounds: rounding, then.

    Example:
        >>> z, drift = torch.randn(2, 400, 6, dtype=torch.float64)
        >>> moments = liar.statistics.Moments()
        >>> moments.update(z, damped_target(z, z + drift))
        >>> no_weight, no_bias = torch.zeros(6, 6), torch.zeros(6)
        >>> fit_damped(moments.normal(affine=False), [], no_weight, no_bias, ridge=0.0).weight.shape
        torch.Size([6, 6])
    """
    out = weight.shape[1]
    part, whole = slice(0, out), slice(out, None)
    is_usable = 0 < sum(held.columns(whole).target_energy for _, held in splits) < inf
    # The whole less the first part is the drift, less the share that the first part has.
    rest = all_data.columns(whole).less(all_data.columns(part))
    # Takes the drift's mean out of the first part; one mean for all splits, since their sums are added up.
    mean = -SHARE / (1 - SHARE) * rest.mean_t
    solution = fit(
        all_data.columns(part).shifted(mean),
        [(fitted.columns(part).shifted(mean), held.columns(part).shifted(mean)) for fitted, held in splits if is_usable],
        weight,
        bias,
        ridge=ridge,
        solver=solver,
        enough=enough,
        start=start,
    )
    if solution.ridge == inf:
        return solution
    share = DAMPED_SHARE / (1 - SHARE)
    change = share * solve(rest, torch.zeros_like(rest.cross), absolute(DAMPING, rest), solver).change
    return replace(solution, weight=solution.weight + change, bias=solution.bias - rest.mean_z @ change)
