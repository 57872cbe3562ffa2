"""Backward elimination against the objective itself on the rows, and against all subsets."""

from itertools import combinations

import numpy as np
import pytest
import torch

from liar.criteria import eliminate
from liar.criteria.elimination import DELAY
from liar.criteria.swaps import LEAST, swapped

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


def swap(x, w, units, ridge=RIDGE):
    return swapped(run(x, w, units, ridge), torch.from_numpy(x.T @ x), torch.from_numpy(w), ridge)


@pytest.mark.parametrize(("units", "width"), [(12, 1), (6, 2), (4, 3), (3, 32), (2 * DELAY + 9, 1)])
def test_every_step_is_the_best_one_and_its_error_is_true(units, width):
    x, w = rows(400, units * width, seed=units), weights(units * width, 5, seed=units)
    found = run(x, w, units)
    left, total = set(range(units)), 0.0
    for number, (unit, increase) in enumerate(zip(found.order.tolist(), found.increases.tolist(), strict=True)):
        if units <= 12:  # else it takes long
            errors = {each: missed(x, w, channels_of(left - {each}, width)) for each in left}
            assert unit == min(errors, key=errors.get)
        left.remove(unit)
        total += increase
        if units <= 12 or number % 40 == 0 or not left:
            assert total == pytest.approx(missed(x, w, channels_of(left, width)), rel=1e-6)
    assert not left


def test_greedy_is_near_the_best_of_all_subsets_and_swaps_nearer():
    """All subsets of 8 neurons, 100 strongly correlated problems, all levels; swaps close more than half of the rest."""
    greedy, better = [], []
    for seed in range(100):
        x, w = rows(60, 8, seed), weights(8, 4, seed)
        found, refined = run(x, w, 8), swap(x, w, 8)
        for level in range(1, 8):
            best = min(missed(x, w, list(kept)) for kept in combinations(range(8), 8 - level))
            greedy.append(float(found.increases[:level].sum()) / best - 1)
            better.append(float(refined.increases[:level].sum()) / best - 1)
    assert min(greedy) > -1e-6
    assert min(better) > -1e-6
    assert np.median(greedy) < 0.02
    assert np.mean(better) < 0.02
    assert np.mean(better) < np.mean(greedy) / 2


@pytest.mark.parametrize(("units", "width"), [(10, 1), (6, 2), (4, 3), (3, 32), (1, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_sets_have_their_size_and_their_error_is_true(units, width, seed):
    x, w = rows(400, units * width, seed), weights(units * width, 5, seed)
    refined = swap(x, w, units)
    assert refined.kept.sum(1).tolist() == list(range(units + 1))
    for left, kept in enumerate(refined.kept):
        want = missed(x, w, channels_of(kept.nonzero().flatten().tolist(), width))
        assert float(refined.increases[: units - left].sum()) == pytest.approx(want, rel=1e-6, abs=1e-6)


def test_sets_are_never_worse_than_those_of_the_elimination():
    changed = 0
    for seed in range(100):
        x, w = rows(60, 8, seed), weights(8, 4, seed)
        found, refined = run(x, w, 8), swap(x, w, 8)
        gained = 1 - refined.increases.cumsum(0) / found.increases.cumsum(0)
        for level in range(1, 9):
            nested = torch.ones(8, dtype=torch.bool).index_fill_(0, found.order[:level], False)
            if torch.equal(refined.kept[8 - level], nested):
                assert float(gained[level - 1]) == pytest.approx(0, abs=1e-12)
            else:
                changed += 1
                assert float(gained[level - 1]) > LEAST
    assert changed > 100


@pytest.mark.parametrize(("units", "width"), [(8, 1), (5, 3)])
def test_no_swap_is_left_that_gains_much(units, width):
    for seed in range(20):
        x, w = rows(60, units * width, seed), weights(units * width, 4, seed)
        found, refined = run(x, w, units), swap(x, w, units)
        for level in range(1, units):
            kept = refined.kept[units - level].nonzero().flatten().tolist()
            if set(kept) == set(found.order[level:].tolist()):
                continue  # what swaps lead to is no better there
            now = missed(x, w, channels_of(kept, width))
            for out in kept:
                for back in set(range(units)) - set(kept):
                    assert missed(x, w, channels_of((set(kept) - {out}) | {back}, width)) > (1 - LEAST - 1e-6) * now


def test_random_orders_are_worse():
    """Negative control: an order that is not looked for loses several times more."""
    found, random = 0.0, 0.0
    for seed in range(100):
        x, w = rows(60, 8, seed), weights(8, 4, seed)
        found += float(run(x, w, 8).increases[:4].sum())
        random += missed(x, w, list(np.random.default_rng(seed).permutation(8)[:4]))
    assert found < random / 3


@pytest.mark.parametrize("units", [4, 8, 16])
def test_swaps_end_where_a_gain_would_be_rounding(units):
    """Dead units, twins, and weights next to nothing: any of several is as good as the other."""
    x, w = rows(200, 16, 0), weights(16, 4, 0)
    x[:, 4:8] = x[:, :4]
    w[:8], w[8:12] = 0, 1e-9 * w[8:12]
    found, refined = run(x, w, units), swap(x, w, units)
    assert torch.all(refined.increases.cumsum(0) <= found.increases.cumsum(0) * (1 + 1e-9))
    assert swap(x, np.full_like(w, np.nan), units).order.sort().values.tolist() == list(range(units))


def test_twins_and_dead_units_go_first():
    x, w = rows(200, 6, 0), weights(6, 4, 0)
    x[:, 2] = 0
    x[:, 5] = x[:, 4]
    found = run(x, w, 6, ridge=1e-9)
    assert set(found.order[:2].tolist()) in ({2, 4}, {2, 5})
    assert float(found.increases[:2].sum()) < 1e-6 * float(found.increases.sum())


def test_nothing_given_is_changed():
    gram, weight = torch.eye(4, dtype=torch.float64), torch.ones(4, 2, dtype=torch.float64)
    swapped(eliminate(gram, weight, 4, RIDGE), gram, weight, RIDGE)
    assert torch.equal(gram, torch.eye(4, dtype=torch.float64))
    assert torch.equal(weight, torch.ones(4, 2, dtype=torch.float64))


def test_a_site_that_never_fires_has_a_curve_of_zeros():
    gram, weight = torch.zeros(4, 4, dtype=torch.float64), torch.ones(4, 2, dtype=torch.float64)
    found = eliminate(gram, weight, 4, RIDGE)
    assert sorted(found.order.tolist()) == [0, 1, 2, 3]
    assert float(found.increases.sum()) < 1e-100
    assert float(swapped(found, gram, weight, RIDGE).increases.sum()) < 1e-100
