"""Least squares for one site: how the kept channels can stand in for what is missing. Tensors only, all in float64.

The unknown is the change `D = V - W_0` of the kept weights (W_0: what stays in place if nothing is done):

    minimise |t - z V - 1 b|^2 + ridge |V - W_0|^2        (our reading of LIAR with a ridge toward the kept weights)

A ridge is relative: the number is multiplied by the mean diagonal of the Gram matrix.
"""

from liar.solve.damped import damped_target, fit_damped
from liar.solve.fit import Solution, fit, fit_drift
from liar.solve.precision import downdate_dtype
from liar.solve.ridge import MIDDLE, RIDGES, SKETCH
from liar.solve.solvers import solve

__all__ = [
    "MIDDLE",
    "RIDGES",
    "SKETCH",
    "Solution",
    "damped_target",
    "downdate_dtype",
    "fit",
    "fit_damped",
    "fit_drift",
    "solve",
]
