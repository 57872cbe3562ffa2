"""Backward elimination: again and again, remove the unit whose removal changes the output least once the rest is refitted.

Structured optimal brain surgeon (Hassibi and Stork 1993; for groups of channels: ZipLM, Kurtic et al. 2023; SlimGPT, Ling
et al. 2024) on the objective of the reconstruction itself:

    error(S) = min_V |X W - X_S V|^2 + ridge |W - V|^2          V is zero outside the kept channels S

Removing the channels J of a unit from S adds `tr(V_J' (H_JJ)^-1 V_J)`, with V the solution so far and H the inverse of the
ridged Gram matrix of S. Both are then updated, never computed anew. A step only reads V; it is written once in many steps,
since in a wide layer that is what takes the time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Channels whose updates of the inverse and of the solution are delayed, so that each becomes one product of matrices.
DELAY = 64


@dataclass(frozen=True)
class Elimination:
    """Units in the order in which they go, and what each step adds to the error.

    Attributes:
        order: int64 [units], the unit that is removed first comes first; the last one would leave the site empty.
        increases: [units], in that order, float64; their running sum is `error(S)`.
    """

    order: Tensor
    increases: Tensor


def eliminate(gram: Tensor, weight: Tensor, units: int, ridge: float) -> Elimination:
    """Remove all units of one site, one after the other.

    Args:
        gram: [channels, channels], second moments of the consumer's input (centred if the consumer has a bias), float64.
        weight: [channels, out], the consumer's.
        units: number of units of channels / units neighbouring channels each.
        ridge: relative to the mean diagonal of the Gram matrix, above 0.
    """
    state = _State.of(gram, weight, units, ridge)
    order, increases = [], []
    for _ in range(units):
        unit, increase = state.cheapest()
        order.append(int(state.names[unit]))
        increases.append(increase)
        state.remove(unit)
    return Elimination(torch.tensor(order), torch.stack(increases).clamp_min(0).cpu())


def ridged(gram: Tensor, ridge: float) -> Tensor:
    """The Gram matrix with the ridge on its diagonal; positive definite, even of a site that never fires."""
    damp = ridge * gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    return gram + damp * torch.eye(len(gram)).to(gram)


@dataclass
class _State:
    """What is left.

    Attributes:
        inverse: of the ridged Gram matrix, [channels, channels]; `delayed delayed'` has yet to be subtracted.
        weight: the solution so far, [channels, out]; `delayed rows` has yet to be subtracted.
        delayed: [channels, at most `DELAY` and a unit].
        rows: [the same, out].
        blocks: diagonal blocks of the true inverse, [units, width, width].
        energy: `V_J V_J'` of every unit, V the true solution, [units, width, width].
        removed: bool [units]; those units leave all tensors with the next update of the inverse.
        names: int64 [units], the units' numbers outside.
    """

    inverse: Tensor
    weight: Tensor
    delayed: Tensor
    rows: Tensor
    blocks: Tensor
    energy: Tensor
    removed: Tensor
    names: Tensor

    @classmethod
    def of(cls, gram: Tensor, weight: Tensor, units: int, ridge: float) -> _State:
        channels = len(gram)
        width = channels // units
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(ridged(gram, ridge)))
        blocks = inverse.view(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()
        solution = weight.to(gram).clone()
        removed, names = torch.zeros(units, dtype=torch.bool, device=gram.device), torch.arange(units, device=gram.device)
        return cls(inverse, solution, gram[:, :0], solution[:0], blocks, _energy(solution, width), removed, names)

    def cheapest(self) -> tuple[int, Tensor]:
        """The unit whose removal adds least to the error, and how much."""
        if self.blocks.shape[1] == 1:
            added = (self.energy / self.blocks).flatten()
        else:
            added = torch.linalg.solve(self.blocks, self.energy).diagonal(dim1=1, dim2=2).sum(1)
        added = added.masked_fill(self.removed, torch.inf)
        unit = int(added.argmin())
        return unit, added[unit]

    def remove(self, unit: int) -> None:
        """Bring everything up to date without the unit."""
        units, width = self.blocks.shape[:2]
        channels = slice(unit * width, (unit + 1) * width)
        columns = self.inverse[:, channels] - self.delayed @ self.delayed[channels].T
        # With L L' the block of the inverse, columns L^-T is its share of the inverse, and L^-1 V that of the solution.
        root = torch.linalg.cholesky(columns[channels])
        share = torch.linalg.solve_triangular(root, columns.T, upper=False).T
        row = torch.linalg.solve_triangular(root, self.weight[channels] - self.delayed[channels] @ self.rows, upper=False)
        across = self.weight @ row.T - self.delayed @ (self.rows @ row.T)
        parts = share.view(units, width, width)
        crossed = parts @ across.view(units, width, width).mT
        self.energy += parts @ (row @ row.T) @ parts.mT - crossed - crossed.mT
        self.blocks -= parts @ parts.mT
        self.blocks[unit] = torch.eye(width).to(self.blocks)
        self.removed[unit] = True
        self.delayed, self.rows = torch.cat([self.delayed, share], 1), torch.cat([self.rows, row])
        if self.delayed.shape[1] >= DELAY:
            self._apply_delayed()

    def _apply_delayed(self) -> None:
        """Update the inverse and the solution, and drop the removed units from all tensors."""
        width = self.blocks.shape[1]
        left = (~self.removed).nonzero().squeeze(1)
        channels = (~self.removed).repeat_interleave(width).nonzero().squeeze(1)
        delayed = self.delayed[channels]
        self.inverse = self.inverse[channels][:, channels].addmm_(delayed, delayed.T, alpha=-1)
        self.weight = self.weight[channels].addmm_(delayed, self.rows, alpha=-1)
        self.delayed, self.rows = delayed[:, :0], self.rows[:0]
        self.blocks, self.energy = self.blocks[left], _energy(self.weight, width)
        self.names, self.removed = self.names[left], self.removed[left]


def _energy(weight: Tensor, width: int) -> Tensor:
    """`V_J V_J'` of every unit, [units, width, width]."""
    rows = weight.view(len(weight) // width, width, weight.shape[1])
    return rows @ rows.mT
