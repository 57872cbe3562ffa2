"""Moments of rows in float64, and the solutions of the normal equations that the rules share."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 4096
# Eigenvalues below this share of the largest are taken for zero: rounding of a float64 Gram of float32 rows.
RCOND = 1e-10


def cross(left: Tensor, right: Tensor) -> Tensor:
    """Moments left' right in float64: [tokens, a], [tokens, b] -> [a, b]. Only one chunk of rows is ever widened."""
    total = left.new_zeros(left.shape[1], right.shape[1], dtype=torch.float64)
    for rows, others in zip(torch.split(left, CHUNK), torch.split(right, CHUNK), strict=True):
        total += rows.double().T @ others.double()
    return total


def dot(left: Tensor, right: Tensor) -> float:
    """Sum of all products in float64, the trace of `cross`: [tokens, a], [tokens, a] -> a number."""
    pairs = zip(torch.split(left, CHUNK), torch.split(right, CHUNK), strict=True)
    return sum(float((rows.double() * others).sum()) for rows, others in pairs)


def product(rows: Tensor, weight: Tensor) -> Tensor:
    """Rows times a float64 weight, float64: [tokens, a], [a, b] -> [tokens, b]."""
    return torch.cat([chunk.double() @ weight for chunk in torch.split(rows, CHUNK)])


def mean(rows: Tensor) -> Tensor:
    """Column means in float64: [tokens, channels] -> [channels]."""
    return rows.mean(0, dtype=torch.float64)


def minimum_norm(gram: Tensor, right: Tensor) -> Tensor:
    """The V of least norm among those that solve gram V = right in the least-squares sense: [a, a], [a, b] -> [a, b]."""
    values, vectors = torch.linalg.eigh(gram)
    solid = values > RCOND * values[-1].clamp_min(torch.finfo(values.dtype).tiny)
    vectors = vectors[:, solid]
    solution: Tensor = vectors @ ((vectors.T @ right) / values[solid, None])
    return solution


def damped(gram: Tensor, right: Tensor, damping: float) -> Tensor:
    """The V with (gram + damping 1) V = right: [a, a], [a, b] -> [a, b]."""
    factor = torch.linalg.cholesky(gram + damping * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    solution: Tensor = torch.cholesky_solve(right, factor)
    return solution
