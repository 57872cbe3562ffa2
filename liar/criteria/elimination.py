"""Backward elimination: which unit is missed least once the others have been refitted in its place, again and again.

Structured optimal brain surgeon (Hassibi and Stork 1993; for groups of channels: ZipLM, Kurtic et al. 2023; SlimGPT, Ling
et al. 2024) on the objective of the reconstruction itself:

    error(S) = min_V |X W - X_S V|^2 + ridge |W - V|^2          V is zero outside the kept channels S

Removing the channels J of a unit from S adds `tr(V_J' (H_JJ)^-1 V_J)`, with V the solution so far and H the inverse of the
ridged Gram matrix of S. Both are then brought up to date, never made anew. All of V is only read in a step, and written once in
many: of a wide layer it is what takes the time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Channels whose updates of the inverse and of the solution are put off, so that each becomes one product of matrices.
DELAY = 64


@dataclass(frozen=True)
class Elimination:
    """Units in the order in which they go, and what each step adds to the error.

    Attributes:
        order: int64 [units], the unit missed least first; the last one would leave the site empty.
        increases: [units], in that order, float64; their running sum is `error(S)`.
        kept: bool [units + 1, units], row n the n units to keep; without rows where those are the last n that go.
    """

    order: Tensor
    increases: Tensor
    kept: Tensor


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
        unit, increase = state.least()
        order.append(int(state.names[unit]))
        increases.append(increase)
        state.remove(unit)
    return Elimination(torch.tensor(order), torch.stack(increases).clamp_min(0).cpu(), torch.ones(0, units, dtype=torch.bool))


def ridged(gram: Tensor, ridge: float) -> Tensor:
    """The Gram matrix with the ridge on its diagonal; positive definite, even of a site that never fires."""
    damp = ridge * gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    return gram + damp * torch.eye(len(gram)).to(gram)


def inverted(gram: Tensor, ridge: float) -> Tensor:
    """The inverse of the `ridged` Gram matrix."""
    return torch.cholesky_inverse(torch.linalg.cholesky(ridged(gram, ridge)))


@dataclass
class _State:
    """What is left.

    Attributes:
        inverse: of the ridged Gram matrix, [channels, channels]; behind by `late late'`.
        weight: the solution so far, [channels, out]; behind by `late rows`.
        late: [channels, at most `DELAY` and a unit].
        rows: [the same, out].
        blocks: diagonal blocks of the true inverse, [units, width, width].
        energy: `V_J V_J'` of every unit, V the true solution, [units, width, width].
        gone: bool [units]; those units are dropped for good with the next update of the inverse.
        names: int64 [units], what the units are called outside.
    """

    inverse: Tensor
    weight: Tensor
    late: Tensor
    rows: Tensor
    blocks: Tensor
    energy: Tensor
    gone: Tensor
    names: Tensor

    @classmethod
    def of(cls, gram: Tensor, weight: Tensor, units: int, ridge: float) -> _State:
        channels = len(gram)
        width = channels // units
        inverse = inverted(gram, ridge)
        blocks = inverse.view(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()
        solution = weight.to(gram).clone()
        gone, names = torch.zeros(units, dtype=torch.bool, device=gram.device), torch.arange(units, device=gram.device)
        return cls(inverse, solution, gram[:, :0], solution[:0], blocks, _energy(solution, width), gone, names)

    def least(self) -> tuple[int, Tensor]:
        """The unit whose removal adds least, and how much."""
        if self.blocks.shape[1] == 1:
            added = (self.energy / self.blocks).flatten()
        else:
            added = torch.linalg.solve(self.blocks, self.energy).diagonal(dim1=1, dim2=2).sum(1)
        added = added.masked_fill(self.gone, torch.inf)
        unit = int(added.argmin())
        return unit, added[unit]

    def remove(self, unit: int) -> None:
        """Bring everything up to date without the unit."""
        units, width = self.blocks.shape[:2]
        channels = slice(unit * width, (unit + 1) * width)
        columns = self.inverse[:, channels] - self.late @ self.late[channels].T
        # With L L' the block of the inverse, columns L^-T is its share of the inverse, and L^-1 V that of the solution.
        root = torch.linalg.cholesky(columns[channels])
        share = torch.linalg.solve_triangular(root, columns.T, upper=False).T
        row = torch.linalg.solve_triangular(root, self.weight[channels] - self.late[channels] @ self.rows, upper=False)
        across = self.weight @ row.T - self.late @ (self.rows @ row.T)
        parts = share.view(units, width, width)
        crossed = parts @ across.view(units, width, width).mT
        self.energy += parts @ (row @ row.T) @ parts.mT - crossed - crossed.mT
        self.blocks -= parts @ parts.mT
        self.blocks[unit] = torch.eye(width).to(self.blocks)
        self.gone[unit] = True
        self.late, self.rows = torch.cat([self.late, share], 1), torch.cat([self.rows, row])
        if self.late.shape[1] >= DELAY:
            self._catch_up()

    def _catch_up(self) -> None:
        """Update the inverse and the solution, and drop what is gone from everything."""
        width = self.blocks.shape[1]
        left = (~self.gone).nonzero().squeeze(1)
        channels = (~self.gone).repeat_interleave(width).nonzero().squeeze(1)
        late = self.late[channels]
        self.inverse = self.inverse[channels][:, channels].addmm_(late, late.T, alpha=-1)
        self.weight = self.weight[channels].addmm_(late, self.rows, alpha=-1)
        self.late, self.rows = late[:, :0], self.rows[:0]
        self.blocks, self.energy = self.blocks[left], _energy(self.weight, width)
        self.names, self.gone = self.names[left], self.gone[left]


def _energy(weight: Tensor, width: int) -> Tensor:
    """`V_J V_J'` of every unit, [units, width, width]."""
    rows = weight.view(len(weight) // width, width, weight.shape[1])
    return rows @ rows.mT
