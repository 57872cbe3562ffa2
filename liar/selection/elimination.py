"""Backward elimination: again and again, remove the unit whose removal changes the output least once the rest is refitted.

Structured optimal brain surgeon (Hassibi and Stork 1993; for groups of channels: ZipLM, Kurtic et al. 2023; SlimGPT, Ling
et al. 2024) on the objective of the reconstruction itself:

    error(S) = min_V |X W - X_S V|^2 + ridge |W - V|^2          V is zero outside the kept channels S

Removing the channels J of a unit from S adds `tr((H_JJ)^-1 V_J V_J')`, with V the solution so far and H the inverse of the
ridged Gram matrix of S. So a step needs H and the products P = V V', both [channels, channels], and never the weights
themselves: its cost does not grow with the number of outputs. Both are written once in many steps, as products of matrices; in
between a step reads the rows of the unit it removes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from liar.solve import downdate_dtype

# Channels whose updates are delayed, so that each becomes one product of matrices.
DELAY = 64
# Removed channels stay in the matrices, where they are zero, until fewer than this share of them is left: copying a matrix
# costs as much as a few updates.
DENSE_ENOUGH = 0.8


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
        order.append(state.names[unit])
        increases.append(increase)
        state.remove(unit)
    return Elimination(torch.stack(order).cpu(), torch.stack(increases).double().clamp_min(0).cpu())


def ridged(gram: Tensor, ridge: float) -> Tensor:
    """The Gram matrix with the ridge on its diagonal; positive definite, even of a site that never fires."""
    damped = gram.clone()
    damped.diagonal().add_(ridge * gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny))
    return damped


@dataclass
class _State:
    """What is left, and the delayed updates.

    With R the rows `V_J` of the units removed since the matrices were written, each scaled by the root of its block of H:

        true inverse = inverse - D' D,   true solution = V - D' R,   E = R V',   C = R R'

    Attributes:
        inverse: H of the channels, [channels, channels].
        products: P = V V', [channels, channels].
        shares: D, [at least `delayed`, channels].
        crossed: E, likewise.
        rows: C, [at least `delayed`, the same].
        delayed: number of rows that are in use of the three.
        blocks: diagonal blocks of the true inverse, [units, width, width]; unit matrices for removed units.
        energy: the same of the true products.
        removed: bool [units]; their rows and columns are zero.
        names: int64 [units], the units' numbers outside.
    """

    inverse: Tensor
    products: Tensor
    shares: Tensor
    crossed: Tensor
    rows: Tensor
    delayed: int
    blocks: Tensor
    energy: Tensor
    removed: Tensor
    names: Tensor

    @classmethod
    def of(cls, gram: Tensor, weight: Tensor, units: int, ridge: float) -> _State:
        width = len(gram) // units
        matrix, solution = ridged(gram, ridge), weight.to(gram)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
        dtype = downdate_dtype(matrix, inverse)
        inverse, products = inverse.to(dtype), (solution @ solution.T).to(dtype)
        most = DELAY + width
        return cls(
            inverse=inverse,
            products=products,
            shares=inverse.new_empty(most, len(gram)),
            crossed=inverse.new_empty(most, len(gram)),
            rows=inverse.new_zeros(most, most),
            delayed=0,
            blocks=_diagonal_blocks(inverse, width),
            energy=_diagonal_blocks(products, width),
            removed=torch.zeros(units, dtype=torch.bool, device=gram.device),
            names=torch.arange(units, device=gram.device),
        )

    def cheapest(self) -> tuple[int, Tensor]:
        """The unit whose removal adds least to the error, and how much."""
        if self.blocks.shape[1] == 1:
            added = (self.energy / self.blocks).flatten()
        else:
            # Not `torch.linalg.solve`: in builds with MKL its batches fail from some 150 channels on once threads are set.
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.blocks))
            added = (inverse * self.energy).sum((1, 2))  # the trace of the product, since both are symmetric
        least, unit = added.masked_fill_(self.removed, torch.inf).min(0)
        return int(unit), least

    def remove(self, unit: int) -> None:
        """Bring everything up to date without the unit."""
        width, used = self.blocks.shape[1], self.delayed
        channels, new = slice(unit * width, (unit + 1) * width), slice(used, used + width)
        shares, own = self.shares[:used], self.shares[:used, channels].T
        # The unit's rows of the true inverse; V_J V'; V_J R'; and of the true products: all [width, …].
        inverse = torch.addmm(self.inverse[channels], own, shares, alpha=-1)
        crossed = torch.addmm(self.products[channels], own, self.crossed[:used], alpha=-1)
        rows = self.crossed[:used, channels].T - own @ self.rows[:used, :used]
        products = torch.addmm(crossed, rows, shares, alpha=-1)
        # With L L' the block of the inverse, L^-1 times a row is its share of the update.
        if width == 1:
            root = inverse[:, channels].sqrt()
            scaled = [part / root for part in (inverse, crossed, rows, products)]
            square = products[:, channels] / root.square()
        else:
            root = torch.linalg.cholesky(inverse[:, channels])
            scaled = [torch.linalg.solve_triangular(root, part, upper=False) for part in (inverse, crossed, rows, products)]
            square = torch.linalg.solve_triangular(root, scaled[3][:, channels].T, upper=False)
        self.shares[new], self.crossed[new] = scaled[:2]
        self.rows[new, :used], self.rows[:used, new], self.rows[new, new] = scaled[2], scaled[2].T, square
        self._update_blocks(scaled[0], scaled[3], square)
        self.blocks[unit] = torch.eye(width).to(self.blocks)
        self.removed[unit] = True
        self.delayed += width
        if self.delayed >= DELAY:
            self._apply_delayed()

    def _update_blocks(self, share: Tensor, product: Tensor, square: Tensor) -> None:
        """Update the diagonal blocks by the shares of a removed unit [width, channels]."""
        units, width = self.blocks.shape[:2]
        if width == 1:
            self.energy.view(1, -1).add_(share * (share * square - 2 * product))
            self.blocks.view(1, -1).addcmul_(share, share, value=-1)
            return
        parts, others = (rows.view(width, units, width) for rows in (share, product))
        parts, crossed = parts.permute(1, 2, 0), parts.permute(1, 2, 0) @ others.permute(1, 0, 2)
        self.energy += parts @ square @ parts.mT - crossed - crossed.mT
        self.blocks -= parts @ parts.mT

    def _apply_delayed(self) -> None:
        """Write the delayed updates, and drop removed units from all tensors where they are many."""
        width, used = self.blocks.shape[1], self.delayed
        shares = self.shares[:used]
        half = torch.addmm(self.crossed[:used], self.rows[:used, :used], shares, alpha=-0.5)
        self.inverse.addmm_(shares.T, shares, alpha=-1)
        self.products.addmm_(shares.T, half, alpha=-1).addmm_(half.T, shares, alpha=-1)
        self.delayed = 0
        left = (~self.removed).nonzero().squeeze(1)
        if len(left) < DENSE_ENOUGH * len(self.removed):
            channels = (~self.removed).repeat_interleave(width).nonzero().squeeze(1)
            self.inverse, self.products = (part[channels][:, channels] for part in (self.inverse, self.products))
            self.shares, self.crossed = (part.new_empty(len(part), len(channels)) for part in (self.shares, self.crossed))
            self.names, self.removed = self.names[left], self.removed[left]
        self.blocks, self.energy = (_diagonal_blocks(part, width) for part in (self.inverse, self.products))
        self.blocks[self.removed] = torch.eye(width).to(self.blocks)


def _diagonal_blocks(square: Tensor, width: int) -> Tensor:
    """[channels, channels] -> [units, width, width]."""
    units = len(square) // width
    return square.view(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()
