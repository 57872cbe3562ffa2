"""Which ridge, and whether to change the weights at all: decided on held-out folds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import inf, sqrt

import torch
from torch import Tensor

from liar.solve.solvers import solve
from liar.statistics import Normal

RIDGES = tuple(10.0**exponent for exponent in range(-5, 2))
MIDDLE = RIDGES[len(RIDGES) // 2]
# Outputs, or random combinations of them, on which ridges are compared.
SKETCH = 64

# (fitted on, held out): normal equations of disjoint parts of the calibration data.
Split = tuple[Normal, Normal]


@dataclass(frozen=True)
class Decision:
    """The relative ridge to use, infinite if the weights are to stay, and the held-out sums of squares it rests on.

    Attributes:
        ridge: relative.
        unchanged: with weights and bias as they were.
        bias_only: with the bias refitted alone.
        updated: with the weights this decision leads to.
        rest: [channels, out], `cross - gram weight` of all rows, where the errors gave it away.
    """

    ridge: float
    unchanged: float
    bias_only: float
    updated: float
    rest: Tensor | None = None


def decide(
    splits: Sequence[Split],
    weight: Tensor,
    bias: Tensor,
    ridge: float | str,
    solver: str,
    *,
    enough: bool,
    start: float = MIDDLE,
) -> Decision:
    """Choose the ridge of one fit.

    A number is used as it is. "auto" is the ridge with the least held-out error, guarded: where that is no better than
    leaving the weights alone, with or without a new bias, they stay (an infinite ridge). So they do where nothing can be
    compared: without splits, and where an error is not a number.

    Args:
        splits: as for `fit`.
        weight: [channels, out], the initial weights.
        bias: [out], the initial bias.
        ridge: relative ridge, or "auto".
        solver: one of the solvers.
        enough: False if there is too little data for held-out errors to decide: "auto" then leaves the weights as they are.
        start: where the search for "auto" begins, one of `RIDGES`: the ridge of a similar fit.
    """
    auto = ridge == "auto"
    if auto and not (splits and enough):
        unchanged = sum(float(held.error(weight, bias)) for _, held in splits)
        return Decision(inf, unchanged, unchanged, unchanged)
    chosen = best_ridge(splits, weight, bias, solver, start) if auto else float(ridge)
    (unchanged, bias_only, updated), rest = held_out_errors(splits, weight, bias, chosen, solver)
    if auto and not (updated < unchanged and updated < bias_only):
        return Decision(inf, unchanged, bias_only, bias_only if bias_only < unchanged else unchanged)
    return Decision(chosen, unchanged, bias_only, updated, rest)


def held_out_errors(
    splits: Sequence[Split], weight: Tensor, bias: Tensor, ridge: float, solver: str
) -> tuple[tuple[float, float, float], Tensor | None]:
    """Sums of squares on the held-out parts: unchanged, with the bias alone refitted, and with this ridge.

    And `cross - gram weight` of all rows, as both parts of a split have them; None without splits.
    """
    errors, of_all = torch.zeros(3, dtype=torch.float64, device=weight.device), None
    for fitted, held in splits:
        rest, of_held = fitted.rest(weight), held.rest(weight)
        changed = weight + solve(fitted, weight, absolute(ridge, fitted), solver, rest=rest).change
        unchanged = torch.stack([bias, _bias(fitted, weight, bias)])
        errors += torch.cat([held.error(weight, unchanged, of_held), held.error(changed, _bias(fitted, changed, bias))[None]])
        of_all = rest_of_all(fitted, held, (rest, of_held), weight)
    unchanged, bias_only, updated = errors.tolist()
    return (unchanged, bias_only, updated), of_all


def rest_of_all(fitted: Normal, held: Normal, rests: tuple[Tensor, Tensor], weight: Tensor) -> Tensor:
    """`cross - gram weight` of the rows of both, from that of each; their means differ, which adds a product of two vectors."""
    pairs = fitted.weight_sum * held.weight_sum / (fitted.weight_sum + held.weight_sum)
    z, t = fitted.mean_z - held.mean_z, fitted.mean_t - held.mean_t
    return torch.addr(rests[0] + rests[1], pairs * z, t - z @ weight)


def _bias(fitted: Normal, weight: Tensor, bias: Tensor) -> Tensor:
    """The bias that fits a weight best; the one that is there where none may be fitted."""
    return fitted.mean_t - fitted.mean_z @ weight if fitted.affine else bias


def best_ridge(splits: Sequence[Split], weight: Tensor, bias: Tensor, solver: str, start: float = MIDDLE) -> float:
    """The ridge of `RIDGES` with the least error on the held-out parts, found by walking down from `start`.

    Ridges are compared on a few random combinations of the outputs: errors add up over outputs, and all outputs share the
    same Gram matrix, so a sketch ranks the ridges as all outputs do at a fraction of the cost.
    """
    sketch = sketch_of(weight)
    zeros = torch.zeros(sketch.shape[1]).to(weight)
    narrow = [(fitted.project_targets(sketch, zeros), held.project_targets(sketch, zeros)) for fitted, held in splits]
    weight, bias = weight @ sketch, bias @ sketch
    rests = [fitted.rest(weight) for fitted, _ in narrow]

    @cache
    def error(index: int) -> float:
        if not 0 <= index < len(RIDGES):
            return inf
        errors = torch.zeros((), dtype=torch.float64, device=weight.device)
        for (fitted, held), rest in zip(narrow, rests, strict=True):
            ridge = absolute(RIDGES[index], fitted)
            changed = weight + solve(fitted, weight, ridge, solver, rest=rest).change
            errors += held.error(changed, _bias(fitted, changed, bias))
        return float(errors)

    index = RIDGES.index(start)
    while (lower := min(index - 1, index + 1, key=error)) >= 0 and error(lower) < error(index):
        index = lower
    return RIDGES[index]


def sketch_of(weight: Tensor) -> Tensor:
    """Random combinations of the outputs of `weight` [channels, out], of mean square 1: [out, at most `SKETCH`]."""
    out = weight.shape[1]
    if out <= SKETCH:
        return torch.eye(out, dtype=weight.dtype, device=weight.device)
    sketch = torch.randn(out, SKETCH, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(weight)
    return sketch.div_(sqrt(SKETCH))


def absolute(ridge: float, normal: Normal) -> Tensor:
    """A relative ridge in the units of a Gram matrix."""
    return torch.tensor(ridge * normal.scale, dtype=torch.float64, device=normal.gram.device)
