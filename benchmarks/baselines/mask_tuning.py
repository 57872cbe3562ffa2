"""Kwon et al. 2022 (arXiv 2204.09656), stage 3: mask tuning, one scale per kept unit.

The scales fit the residual stream of a teacher, through LSMR with damping 1 on the normal equations, around 1. The teacher is
the model with the mask that the same selection gives at the square root of the share, or, as a variant, the dense model. As in
the authors' code, attention gets a free common intercept that is thrown away afterwards, and scales outside [-10, 10] or a
solver that did not converge are refused. Where that happens, their code stops tuning all later layers; here only the site stays
as it was. Their code also leaves the first attention layer alone, and tunes the last feed-forward layer of classifiers on the
first token only; here every site is tuned on all tokens.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy
import torch
from scipy.sparse.linalg import lsmr
from torch import Tensor

from benchmarks.baselines.least_squares import cross
from benchmarks.baselines.site_data import Answer, Rule, SiteData

DAMPING = 1.0
LARGEST = 10.0


def solve(data: SiteData) -> Answer:
    """W' = diag(s) W_u, b' = b."""
    scales = tuned(*normal_equations(data))[: int(data.unit.max()) + 1]
    if not accepted(scales):
        return data.kept_weight, data.bias
    return scales[data.unit, None] * data.kept_weight, data.bias


def normal_equations(data: SiteData) -> tuple[Tensor, Tensor]:
    """A'A [units, units] and A'b [units], where column j of A is vec(Z_j W_j): what unit j adds to the stream.

    A itself ([tokens * out, units]) is never formed. For heads the last unit is the intercept, a column of ones.
    """
    weight, target = data.kept_weight, data.target()
    units = int(data.unit.max()) + 1
    belongs = torch.nn.functional.one_hot(data.unit, units).to(weight)
    gram = belongs.T @ (cross(data.kept_inputs, data.kept_inputs) * (weight @ weight.T)) @ belongs
    right = belongs.T @ (cross(data.kept_inputs, target) * weight).sum(1)
    if data.kind != "heads":
        return gram, right
    edge = belongs.T @ (data.kept_inputs.sum(0, dtype=torch.float64) * weight.sum(1))
    corner = edge.new_tensor([[target.numel()]])
    gram = torch.cat([torch.cat([gram, edge[:, None]], 1), torch.cat([edge[None], corner], 1)])
    return gram, torch.cat([right, target.sum()[None]])


def tuned(gram: Tensor, right: Tensor) -> Tensor:
    """1 + argmin_r |gram r - (right - gram 1)|^2 + |r|^2; NaN where LSMR does not converge.

    SciPy's own limit on iterations is a fifth of what the authors' solver allows, and is too few for wide layers.
    """
    solution = lsmr(gram.cpu().numpy(), (right - gram.sum(1)).cpu().numpy(), damp=DAMPING, maxiter=5 * len(gram))
    converged = solution[1] < 3
    return 1 + torch.from_numpy(solution[0] if converged else numpy.full(len(gram), numpy.nan)).to(gram)


def accepted(scales: Tensor) -> bool:
    """Whether all scales are numbers in [-10, 10]."""
    return bool((scales.abs() <= LARGEST).all())


DENSE_TEACHER = Rule(solve, frozenset({"kept_inputs", "dense_sum", "residual"}))
RULE = replace(DENSE_TEACHER, teacher=math.sqrt)
