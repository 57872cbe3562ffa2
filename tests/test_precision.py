"""Solves with a factor in float32 against float64, and where float64 has to do it."""

import numpy as np
import pytest
import torch

from liar.solve import precision, solve
from liar.solve.precision import BACKWARD_ERROR, factor_dtype, is_refined, solve_refined
from liar.statistics import Normal

# Ten systems: (condition, size of the numbers, spread of the channels' scales).
ILL = [(condition, size, scales) for condition in (1e3, 1e4, 1e5, 1e6, 1e7) for size, scales in ((1.0, 0), (1e6, 4))]


def system(condition, size=1.0, scales=0, channels=120, columns=3, seed=0):
    """A positive definite matrix whose scaled form has a condition, with channels of very different sizes, and columns."""
    generator = np.random.default_rng(seed)
    basis = np.linalg.qr(generator.normal(size=(channels, channels)))[0]
    matrix = basis * np.geomspace(1, 1 / condition, channels) @ basis.T
    scale = size * 10 ** generator.uniform(-scales / 2, scales / 2, size=channels)
    matrix = matrix * scale[:, None] * scale
    return torch.from_numpy((matrix + matrix.T) / 2), torch.from_numpy(generator.normal(size=(channels, columns)))


@pytest.mark.parametrize(("condition", "size", "scales"), ILL)
def test_refined_solutions_are_those_of_float64(condition, size, scales):
    """The backward error is below its bound, and the error is at most that times twice the condition."""
    matrix, rest = system(condition, size, scales)
    found, diagonal = solve_refined(matrix, rest)
    expected = torch.linalg.solve(matrix, rest)
    missed = (rest - matrix @ found).norm()
    assert missed <= 1.01 * BACKWARD_ERROR * (matrix.norm() * found.norm() + rest.norm())
    bound = 2 * BACKWARD_ERROR * float(torch.linalg.cond(matrix))
    assert float((found - expected).norm() / expected.norm()) <= bound
    # For the condition, of which it gives a bound only.
    torch.testing.assert_close(diagonal, torch.linalg.cholesky(matrix).diagonal(), rtol=0.05, atol=0)


def test_a_plain_solve_in_float32_would_not_do():
    """Negative control: without the corrections the bound is missed by orders of magnitude."""
    matrix, rest = system(1e6)
    plain = torch.cholesky_solve(rest.float(), torch.linalg.cholesky(matrix.float())).double()
    assert (rest - matrix @ plain).norm() > 1e3 * BACKWARD_ERROR * (matrix.norm() * plain.norm() + rest.norm())


@pytest.mark.parametrize("condition", [1e10, 1e14])
def test_no_answer_where_the_condition_does_not_allow_it(condition):
    assert solve_refined(*system(condition)) is None


def test_several_ridges_in_one_batch():
    matrix, rest = system(1e5)
    ridges = torch.tensor([1e-3, 1e-1], dtype=torch.float64)
    damped = matrix + ridges[:, None, None] * torch.eye(len(matrix))
    found, _ = solve_refined(damped, rest)
    for each, one in zip(found, damped, strict=True):
        expected = torch.linalg.solve(one, rest)
        assert float((each - expected).norm() / expected.norm()) <= 2 * BACKWARD_ERROR * float(torch.linalg.cond(one))


def normal_of(condition, channels=600, columns=2):
    matrix, rest = system(condition, channels=channels, columns=columns)
    zeros = torch.zeros(channels, dtype=torch.float64)
    return Normal(10_000, 10_000.0, matrix, rest, 1.0, zeros, zeros[:columns], affine=False, rank_tolerance=1e-7), rest


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e12])
def test_the_solver_on_a_device_that_is_slow_at_float64(condition, monkeypatch):
    """It uses float32 where that is enough, and gives what float64 gives either way."""
    normal, rest = normal_of(condition)
    weight, ridge = torch.zeros_like(rest), torch.tensor(1e-12, dtype=torch.float64)
    expected = solve(normal, weight, ridge, "auto")
    used = []
    monkeypatch.setattr(precision, "factor_dtype", lambda _: torch.float32)
    refined = precision.solve_refined
    monkeypatch.setattr("liar.solve.solvers.solve_refined", lambda *args: used.append(refined(*args)) or used[-1])
    found = solve(normal, weight, ridge, "auto")
    assert len(used) == 1
    assert (used[0] is None) == (condition > 1e9)
    assert found.rank == expected.rank
    torch.testing.assert_close(found.change, expected.change, rtol=1e-7, atol=1e-7 * float(expected.change.abs().max()))


def test_a_sketch_is_refined_and_a_whole_layer_is_not(monkeypatch):
    """Residuals of many columns would cost more operations in float64 than the factor saves."""
    monkeypatch.setattr(precision, "factor_dtype", lambda _: torch.float32)
    matrix = torch.zeros(1, 1).expand(11_008, 11_008)
    assert is_refined(matrix, 64)
    assert not is_refined(matrix, 4_096)


def test_the_processor_does_float64():
    assert factor_dtype(torch.device("cpu")) == torch.float64
    assert not is_refined(torch.zeros(1, 1).expand(11_008, 11_008), 64)


@pytest.mark.parametrize(("capability", "dtype"), [((9, 0), torch.float64), ((8, 0), torch.float64), ((8, 9), torch.float32)])
def test_the_device_decides(capability, dtype, monkeypatch):
    """An H100 and an A100; an RTX 4090 or L4."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert factor_dtype(torch.device("cuda")) == dtype
