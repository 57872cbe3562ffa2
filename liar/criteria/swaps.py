"""Swaps: a removed unit comes back, another goes instead, for as long as that lowers the error (OSSCAR, Meng et al. 2024).

An elimination never takes back what it removed, so what it leaves is not always the best of that size. The tableau below is
the Gram matrix after block pivots on the kept channels (Goodnight 1979, the sweep operator): with `C` the Schur complement of
the kept channels S in the ridged Gram matrix G, and R the removed ones,

    matrix = [[-G_SS^-1,  G_SS^-1 G_SR],          values = [[V_S    ],      V: the solution,
              [   .    ,  C           ]]                    [C W_R  ]]      error(S) = tr(W_R' C W_R)

so that what every removal and every return changes can be read off, and both are the same pivot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from liar.criteria.elimination import Elimination, inverted

# Sites with more units keep the nested sets of the elimination: single swaps change little there, and are too many to try.
MOST = 32
# Relative to the error: a swap that gains less is not made.
LEAST = 0.01
# Relative to the error of an empty site: where less is missed a gain may be rounding, and errors count as this one.
NOTHING = 1e-9


def swapped(found: Elimination, gram: Tensor, weight: Tensor, ridge: float) -> Elimination:
    """An elimination with the best set of every size that swaps lead to, where those are better than its own.

    Args:
        found: what `eliminate` made of the others.
        gram: see `eliminate`.
        weight: see `eliminate`.
        ridge: see `eliminate`.
    """
    if not gram.any():
        return found  # nothing to choose by
    units = len(found.order)
    tableau = _Tableau.of(gram, weight, units, ridge)
    nested = torch.ones(units, dtype=torch.bool)
    kept, errors = [nested.clone()], [torch.zeros((), dtype=torch.float64)]
    now, nothing = errors[0], NOTHING * found.increases.sum()
    for unit, error in zip(found.order.tolist(), found.increases.cumsum(0), strict=True):
        nested[unit] = False
        now = tableau.shrink(now, nothing)
        better = bool(error - now > LEAST * error.clamp_min(nothing))
        kept.append(tableau.kept.clone().cpu() if better else nested.clone())
        errors.append(now if better else error)
    return Elimination(found.order, torch.stack(errors).diff(), torch.stack(kept[::-1]))


@dataclass
class _Tableau:
    """See the top of this file.

    Attributes:
        matrix: [channels, channels].
        values: [channels, out].
        kept: bool [units].
    """

    matrix: Tensor
    values: Tensor
    kept: Tensor

    @classmethod
    def of(cls, gram: Tensor, weight: Tensor, units: int, ridge: float) -> _Tableau:
        kept = torch.ones(units, dtype=torch.bool, device=gram.device)
        return cls(-inverted(gram, ridge), weight.to(gram).clone(), kept)

    def shrink(self, error: Tensor, nothing: Tensor) -> Tensor:
        """Remove the unit that is missed least, then swap while that helps; the error after it, of the one before."""
        added = self._added(self._values(), self._blocks().neg())
        unit = int(added.argmin())
        error = error + added[unit].cpu()
        self.pivot(unit)
        while True:
            gain, back, out = self.swap()
            if not gain > LEAST * error.clamp_min(nothing):
                return error
            error = error - gain
            self.pivot(back)
            self.pivot(out)

    def swap(self) -> tuple[Tensor, int, int]:
        """By how much the best swap lowers the error, the removed unit that comes back, and the kept one that goes."""
        units, width, _ = self._values().shape
        best = (torch.tensor(-torch.inf, dtype=self.values.dtype), 0, 0)
        for back in (~self.kept).nonzero().flatten().tolist():
            block, value = self._blocks()[back], self._values()[back]
            across = self.matrix[:, back * width : (back + 1) * width].view(units, width, width)
            share = torch.linalg.solve(block, across, left=False)
            added = self._added(self._values() - share @ value, share @ across.mT - self._blocks())
            out = int(added.argmin())
            gain = (value * torch.linalg.solve(block, value)).sum() - added[out]
            if gain > best[0]:
                best = gain.cpu(), back, out
        return best

    def pivot(self, unit: int) -> None:
        """Remove a kept unit, or take a removed one back."""
        width = self._values().shape[1]
        at = slice(unit * width, (unit + 1) * width)
        sign = -1 if self.kept[unit] else 1
        block, columns, value = self.matrix[at, at].clone(), self.matrix[:, at].clone(), self.values[at].clone()
        share = torch.linalg.solve(block, columns, left=False)
        self.matrix -= share @ columns.T
        self.values -= share @ value
        self.matrix[:, at], self.matrix[at] = sign * share, sign * share.T
        self.matrix[at, at] = -torch.linalg.inv(block)
        self.values[at] = sign * torch.linalg.solve(block, value)
        self.kept[unit] = sign > 0

    def _added(self, values: Tensor, inverse: Tensor) -> Tensor:
        """[units], from solutions [units, width, out] and blocks of the inverse Gram matrix [units, width, width]."""
        root = torch.linalg.cholesky(inverse[self.kept])
        added = torch.linalg.solve_triangular(root, values[self.kept], upper=False).square().sum((1, 2))
        return values.new_full(self.kept.shape, torch.inf).masked_scatter(self.kept, added)

    def _values(self) -> Tensor:
        """[units, width, out]."""
        return self.values.view(len(self.kept), -1, self.values.shape[1])

    def _blocks(self) -> Tensor:
        """Diagonal blocks of the matrix, [units, width, width]."""
        units, width, _ = self._values().shape
        return self.matrix.view(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
