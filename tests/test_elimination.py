"""Backward elimination against the objective itself on the rows, and against all subsets."""

from itertools import combinations

import numpy as np
import pytest
import torch

from liar.selection import eliminate
from liar.selection.elimination import DELAY, ridged
from liar.solve import precision

RIDGE = 1e-2


def rows(tokens, channels, seed, decay=0.7):
    """Correlated rows: a random mixture of channels of falling energy."""
    generator = np.random.default_rng(seed)
    source = generator.normal(size=(tokens, channels)) * decay ** np.arange(channels)
    return source @ generator.normal(size=(channels, channels))


def weights(channels, out, seed):
    return np.random.default_rng(seed + 1000).normal(size=(channels, out))


def missed(x, w, kept, ridge=RIDGE):
    """min over V of |x W - x_S V|^2 + ridge |W - V|^2, on the rows, by an augmented least squares."""
    damp = np.sqrt(ridge * np.square(x).sum(0).mean())
    augmented = np.concatenate([x, damp * np.eye(x.shape[1])])
    target = augmented @ w
    v = np.linalg.lstsq(augmented[:, kept], target, rcond=None)[0] if len(kept) else np.zeros((0, w.shape[1]))
    return float(np.square(target - augmented[:, kept] @ v).sum())


def channels_of(units, width):
    return [unit * width + i for unit in sorted(units) for i in range(width)]


def run(x, w, units, ridge=RIDGE):
    gram = torch.from_numpy(x.T @ x)
    return eliminate(gram, torch.from_numpy(w), units, ridge)


@pytest.mark.parametrize(("units", "width"), [(12, 1), (6, 2), (4, 3), (3, 32)])
def test_every_step_is_the_best_one_and_its_error_is_true(units, width):
    x, w = rows(400, units * width, seed=units), weights(units * width, 5, seed=units)
    result = run(x, w, units)
    left, total = set(range(units)), 0.0
    for unit, increase in zip(result.order.tolist(), result.increases.tolist(), strict=True):
        errors = {each: missed(x, w, channels_of(left - {each}, width)) for each in left}
        assert unit == min(errors, key=errors.get)
        left.remove(unit)
        total += increase
        assert total == pytest.approx(missed(x, w, channels_of(left, width)), rel=1e-6)
    assert not left


def test_errors_stay_true_over_many_delayed_updates():
    """The inverse is written once in `DELAY` steps; looked at on both sides of the writes."""
    units = 2 * DELAY + 9
    x, w = rows(400, units, seed=units), weights(units, 5, seed=units)
    result = run(x, w, units)
    errors, order = result.increases.cumsum(0), result.order.tolist()
    for step in (1, 40, DELAY - 1, DELAY, DELAY + 1, 2 * DELAY, 2 * DELAY + 1, units - 1, units):
        assert float(errors[step - 1]) == pytest.approx(missed(x, w, channels_of(order[step:], 1)), rel=1e-6)


def test_greedy_is_near_the_best_of_all_subsets():
    """All subsets of 8 neurons, 60 strongly correlated problems, all levels."""
    excess = []
    for seed in range(60):
        x, w = rows(60, 8, seed), weights(8, 4, seed)
        errors = run(x, w, 8).increases.cumsum(0)
        for level in range(1, 8):
            best = min(missed(x, w, list(kept)) for kept in combinations(range(8), 8 - level))
            excess.append(float(errors[level - 1]) / best - 1)
    assert min(excess) > -1e-6
    assert np.median(excess) < 0.02


def test_random_orders_are_worse():
    """Negative control: a random order loses several times more."""
    greedy, random = 0.0, 0.0
    for seed in range(100):
        x, w = rows(60, 8, seed), weights(8, 4, seed)
        greedy += float(run(x, w, 8).increases[:4].sum())
        random += missed(x, w, list(np.random.default_rng(seed).permutation(8)[:4]))
    assert greedy < random / 3


@pytest.mark.parametrize("units", [4, 8, 16])
def test_units_that_do_not_matter(units):
    """Dead units, twins, and weights next to nothing: every unit goes once, at no cost below zero."""
    x, w = rows(200, 16, 0), weights(16, 4, 0)
    x[:, 4:8] = x[:, :4]
    w[:8], w[8:12] = 0, 1e-9 * w[8:12]
    result = run(x, w, units)
    assert result.order.sort().values.tolist() == list(range(units))
    assert float(result.increases.min()) >= 0
    assert float(result.increases.sum()) == pytest.approx(missed(x, w, []), rel=1e-6)


def test_twins_and_dead_units_go_first():
    x, w = rows(200, 6, 0), weights(6, 4, 0)
    x[:, 2] = 0
    x[:, 5] = x[:, 4]
    result = run(x, w, 6, ridge=1e-9)
    assert set(result.order[:2].tolist()) in ({2, 4}, {2, 5})
    assert float(result.increases[:2].sum()) < 1e-6 * float(result.increases.sum())


def test_nothing_given_is_changed():
    gram, weight = torch.eye(4, dtype=torch.float64), torch.ones(4, 2, dtype=torch.float64)
    eliminate(gram, weight, 4, RIDGE)
    assert torch.equal(gram, torch.eye(4, dtype=torch.float64))
    assert torch.equal(weight, torch.ones(4, 2, dtype=torch.float64))


def test_a_site_that_never_fires_has_a_curve_of_zeros():
    gram, weight = torch.zeros(4, 4, dtype=torch.float64), torch.ones(4, 2, dtype=torch.float64)
    result = eliminate(gram, weight, 4, RIDGE)
    assert sorted(result.order.tolist()) == [0, 1, 2, 3]
    assert float(result.increases.sum()) < 1e-100


def spread(channels, out, condition, seed):
    """A Gram matrix of some condition, and weights."""
    generator = np.random.default_rng(seed)
    basis = np.linalg.qr(generator.normal(size=(channels, channels)))[0]
    gram = basis * np.geomspace(1, 1 / condition, channels) @ basis.T
    return torch.from_numpy(gram + gram.T), torch.from_numpy(generator.normal(size=(channels, out)))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("units", "ridge"), [(160, 1e-3), (40, 1e-3)])
def test_in_float32_errors_are_those_of_float64(units, ridge, seed, monkeypatch):
    """To a thousandth, at every number of units; as on a device that is slow at float64."""
    gram, weight = spread(160, 24, 1e8, seed)
    expected = eliminate(gram, weight, units, ridge)
    monkeypatch.setattr(precision, "factor_dtype", lambda _: torch.float32)
    assert precision.downdate_dtype(ridged(gram, ridge), torch.linalg.inv(ridged(gram, ridge))) == torch.float32
    found = eliminate(gram, weight, units, ridge)
    assert not torch.equal(found.increases, expected.increases)
    torch.testing.assert_close(found.increases.cumsum(0), expected.increases.cumsum(0), rtol=1e-3, atol=0)


def test_float64_is_kept_where_float32_would_cancel(monkeypatch):
    gram, weight = spread(160, 24, 1e8, 0)
    expected = eliminate(gram, weight, 160, 1e-6)
    monkeypatch.setattr(precision, "factor_dtype", lambda _: torch.float32)
    found = eliminate(gram, weight, 160, 1e-6)
    assert torch.equal(found.order, expected.order)
    assert torch.equal(found.increases, expected.increases)


@pytest.fixture
def two_threads():
    """Set in the process: then batched LU of PyTorch's MKL builds fails from some 150 rows on."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_wide_units_with_threads_set():
    width = 192
    x, w = np.random.default_rng(0).normal(size=(1200, 3 * width)), weights(3 * width, 5, seed=0)
    result = run(x, w, 3)
    order, errors = result.order.tolist(), result.increases.cumsum(0).tolist()
    assert errors == pytest.approx([missed(x, w, channels_of(order[step:], width)) for step in (1, 2, 3)], rel=1e-6)
