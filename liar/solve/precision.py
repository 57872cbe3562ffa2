"""In which precision matrices are factorised: the one place that looks at the device.

Sums and solves are in float64. Where the device is much slower at that, a factor in float32 does most of the work, and
residuals in float64 correct what it gives (iterative refinement: Higham 2002, chapter 12): the answer then has a backward error
that the statistics do not notice, or there is none, and it is solved in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Compute capabilities of GPUs that do float64 at half the rate of float32 or nearly so: P100, V100, A100, H100, B200. Others,
# made for graphics and inference, do it at a 32nd or a 64th.
FULL_RATE = frozenset({(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)})
# Backward error at which an answer is as good as one in float64: the statistics themselves are rounded to 1e-7 or worse.
BACKWARD_ERROR = 1e-12
# Corrections, after which a factor in float32 is of no use: each gains the digits that the condition leaves of seven.
CORRECTIONS = 8
# Products in float64 that corrections usually take, by which the refined solve has to be cheaper than a plain one.
USUAL = 3
# Cancellation that leaves four digits of float32.
INFLATION = 1e4


def factor_dtype(device: torch.device) -> torch.dtype:
    """float64 where it is fast enough, else float32."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) not in FULL_RATE:
        return torch.float32
    return torch.float64


def downdate_dtype(matrix: Tensor, inverse: Tensor) -> torch.dtype:
    """In which precision channels can be taken out of a matrix, one after the other, by updates of its inverse.

    While others go, a diagonal entry of the inverse falls, at last to one over that of the matrix. By how much, the channel's
    variance inflation factor, is what cancels.
    """
    if factor_dtype(matrix.device) == torch.float32 and bool((matrix.diagonal() * inverse.diagonal()).max() <= INFLATION):
        return torch.float32
    return torch.float64


def is_refined(matrix: Tensor, columns: int) -> bool:
    """Whether to solve for so many columns with a factor in float32: fewer operations in float64 than solving there."""
    channels = matrix.shape[-1]
    cheaper = USUAL * 2 * columns < channels / 3 + 2 * columns
    return cheaper and factor_dtype(matrix.device) == torch.float32


def solve_refined(matrix: Tensor, rest: Tensor) -> tuple[Tensor, Tensor] | None:
    """The solution of `matrix x = rest`, with a factor in float32 and residuals in float64.

    Args:
        matrix: [*, n, n], positive definite, float64.
        rest: [*, n, columns] or [n, columns], float64.

    Returns:
        x [*, n, columns], with a backward error `|rest - matrix x| / (|matrix| |x| + |rest|)` (Frobenius norms) of at most
        `BACKWARD_ERROR`, and the diagonal of the Cholesky factor [*, n]; None if the condition does not allow it.
    """
    # Scaled to a diagonal of ones, which also keeps everything in float32's range.
    scale = matrix.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(matrix.dtype).tiny).rsqrt()[..., None]
    factor, info = torch.linalg.cholesky_ex((scale * matrix * scale.mT).float())
    if bool((info != 0).any()):
        return None
    norms = [torch.linalg.matrix_norm(part) for part in (matrix, rest)]
    solution, residual = torch.zeros_like(scale), rest
    for _ in range(CORRECTIONS):
        # As long as the answer, so that small residuals do not vanish in float32.
        size = residual.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)
        half = torch.linalg.solve_triangular(factor, (scale * residual / size).float(), upper=False)
        correction = torch.linalg.solve_triangular(factor.mT, half, upper=True)
        solution = solution + size * scale * correction
        residual = rest - matrix @ solution
        allowed = BACKWARD_ERROR * (norms[0] * torch.linalg.matrix_norm(solution) + norms[1])
        if bool((torch.linalg.matrix_norm(residual) <= allowed).all()):
            return solution, factor.diagonal(dim1=-2, dim2=-1) / scale.squeeze(-1)
    return None
