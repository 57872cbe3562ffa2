"""Every solver against scipy.linalg.lstsq on the rows themselves, in float64."""

from math import inf, isnan, nan

import numpy as np
import pytest
import torch
from cases import CONDITIONS, SHAPES, SINGULARITIES, SOLVERS, problem, rows
from hypothesis import given
from hypothesis import strategies as st
from reference import absolute, centred, least_squares, squares

from liar.solve import RIDGES, SKETCH, damped_target, fit, fit_damped, fit_drift, solve
from liar.solve import ridge as ridge_module
from liar.solve.ridge import sketch_of
from liar.statistics import Factor, Folds, Moments, TokenIndex
from liar.statistics import normal as normal_module
from liar.statistics.normal import KEPT, Spectrum
from liar.verdicts import Verdict


def tensor(values):
    return torch.as_tensor(values, dtype=torch.float64)


def normal_of(z, t, affine, kind=Factor):
    """A `Factor` serves every solver: it carries the Gram matrix as well."""
    made = kind()
    made.update(tensor(z), tensor(t))
    return made.normal(affine=affine)


def kind_for(solver):
    return Factor if solver == "lstsq" else Moments


def splits_of(p, affine, kind, folds=4):
    """(fitted on, held out) for every fold of the rows; none where only one fold has rows."""
    number = np.arange(len(p.z)) % folds
    held = [number == fold for fold in range(folds) if (number == fold).any()]
    if len(held) == 1:
        return []
    return [tuple(normal_of(p.z[rows], p.t[rows], affine, kind) for rows in (~inside, inside)) for inside in held]


def fitted(p, solver, ridge, affine):
    kind = kind_for(solver)
    return fit(
        normal_of(p.z, p.t, affine, kind),
        splits_of(p, affine, kind),
        tensor(p.start),
        tensor(p.bias),
        ridge=ridge,
        solver=solver,
    )


def assert_output_close(got, want, tolerance):
    error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    if not error < tolerance:
        raise AssertionError(f"fitted output differs by {error:.3g}, allowed {tolerance:.3g}")


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_fitted_output_equals_scipy(solver, affine, condition, shape):
    # A mean that is not taken out would be a direction of its own, and the condition another.
    p = problem(*SHAPES[shape], condition, mean=1.0 if affine else 0.0)
    normal = normal_of(p.z, p.t, affine, kind_for(solver))
    weight = (tensor(p.start) + solve(normal, tensor(p.start), tensor(0.0), solver).change).numpy()
    bias = (normal.mean_t - normal.mean_z @ weight).numpy() if affine else np.zeros_like(p.bias)
    want, want_bias = least_squares(p.z, p.t, p.start, np.zeros_like(p.bias), affine=affine)
    assert_output_close(p.z @ weight + bias, p.z @ want + want_bias, 1e-6)


def test_the_comparison_notices_the_start():
    p = problem(200, 8, 3)
    want, bias = least_squares(p.z, p.t, p.start, p.bias, affine=True)
    with pytest.raises(AssertionError):
        assert_output_close(p.z @ p.start + bias, p.z @ want + bias, 1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("ridge", [1e-5, 1e-2, 1.0, 1e3])
@pytest.mark.parametrize("singular", [None, *SINGULARITIES])
def test_ridge_equals_scipy_on_augmented_rows(solver, affine, ridge, singular):
    p = problem(200, 8, 3)
    change, tokens = SINGULARITIES[singular] if singular else (lambda z: z, 200)
    z, t = change(p.z.copy())[:tokens], p.t[:tokens]
    normal = normal_of(z, t, affine, kind_for(solver))
    strength = absolute(ridge, z, affine)
    assert normal.scale * ridge == pytest.approx(strength, rel=1e-9, abs=1e-20)
    found = solve(normal, tensor(p.start), tensor(strength), solver)
    want, _ = least_squares(z, t, p.start, p.bias, affine=affine, ridge=strength)
    torch.testing.assert_close(tensor(p.start) + found.change, tensor(want), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("singular", SINGULARITIES)
@pytest.mark.parametrize("from_zero", [True, False])
def test_dependent_channels_get_scipys_minimum_norm_change(solver, affine, singular, from_zero):
    p = problem(200, 8, 3)
    change, tokens = SINGULARITIES[singular]
    z, t = change(p.z.copy())[:tokens], p.t[:tokens]
    start = np.zeros_like(p.start) if from_zero else p.start
    normal = normal_of(z, t, affine, kind_for(solver))
    found = solve(normal, tensor(start), tensor(0.0), solver)
    want, _ = least_squares(z, t, start, p.bias, affine=affine)
    torch.testing.assert_close(found.change, tensor(want - start), rtol=1e-6, atol=1e-8)
    z_centred, _ = centred(z, affine)
    assert found.rank == np.linalg.matrix_rank(z_centred, tol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("singular", SINGULARITIES)
@pytest.mark.parametrize("ridge", [0, 0.01])
def test_fit_ends_with_a_verdict_and_never_an_exception(solver, affine, singular, ridge):
    p = problem(200, 8, 3)
    change, tokens = SINGULARITIES[singular]
    p = type(p)(change(p.z.copy())[:tokens], p.t[:tokens], p.start, p.bias)
    found = fitted(p, solver, ridge, affine)
    assert bool(torch.isfinite(found.weight).all() and torch.isfinite(found.bias).all())
    rank = np.linalg.matrix_rank(centred(p.z, affine)[0], tol=1e-6)
    if tokens <= 8:
        expected = Verdict.TOO_FEW_TOKENS
    elif ridge:
        expected = Verdict.RIDGED
    else:
        expected = Verdict.RANK_DEFICIENT if rank < 8 else Verdict.OK
    assert found.verdict is expected


@pytest.mark.parametrize(
    ("tokens", "ridge", "singular", "verdict"),
    [
        (100, 0, None, Verdict.OK),
        (100, 0.1, None, Verdict.RIDGED),
        (100, 0, "duplicated_channel", Verdict.RANK_DEFICIENT),
        (100, 0.1, "duplicated_channel", Verdict.RIDGED),
        (8, 0.1, None, Verdict.TOO_FEW_TOKENS),
        (9, 0.1, None, Verdict.RIDGED),
        (8, 0, "duplicated_channel", Verdict.TOO_FEW_TOKENS),
    ],
)
def test_verdicts(tokens, ridge, singular, verdict):
    p = problem(200, 8, 3)
    z = SINGULARITIES[singular][0](p.z.copy()) if singular else p.z
    p = type(p)(z[:tokens], p.t[:tokens], p.start, p.bias)
    assert fitted(p, "auto", ridge, True).verdict is verdict


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("singular", [None, "duplicated_channel", "fewer_tokens_than_channels"])
def test_batched_ridges_equal_one_at_a_time(solver, singular):
    p = problem(200, 8, 3)
    change, tokens = SINGULARITIES[singular] if singular else (lambda z: z, 200)
    normal = normal_of(change(p.z.copy())[:tokens], p.t[:tokens], True, kind_for(solver))
    ridges = tensor([1e-3, 0.1, 5.0, 100.0]) * normal.scale
    together = solve(normal, tensor(p.start), ridges, solver).change
    assert together.shape == (4, 8, 3)
    for one, ridge in zip(together, ridges, strict=True):
        torch.testing.assert_close(one, solve(normal, tensor(p.start), ridge, solver).change, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("solver", SOLVERS)
@given(seed=st.integers(0, 1000), ridge=st.sampled_from([0.0, 1e-4, 1e-2, 1.0]), affine=st.booleans())
def test_the_gradient_vanishes_at_the_solution(solver, seed, ridge, affine):
    p = problem(60, 5, 3, condition=100, seed=seed)
    normal = normal_of(p.z, p.t, affine, kind_for(solver))
    strength = ridge * normal.scale
    weight = p.start + solve(normal, tensor(p.start), tensor(strength), solver).change.numpy()
    (z, _), (t, _) = centred(p.z, affine), centred(p.t, affine)
    gradient = z.T @ (z @ weight - t) + strength * (weight - p.start)
    at_start = z.T @ (z @ p.start - t)
    assert np.abs(gradient).max() < 1e-8 * np.abs(at_start).max()


@pytest.mark.parametrize("solver", SOLVERS)
@given(seed=st.integers(0, 1000), ridge=st.sampled_from([0.0, 1e-3, 1.0]))
def test_no_other_weights_are_better(solver, seed, ridge):
    p = problem(60, 5, 3, seed=seed)
    normal = normal_of(p.z, p.t, True, kind_for(solver))
    strength = ridge * normal.scale
    weight = p.start + solve(normal, tensor(p.start), tensor(strength), solver).change.numpy()
    (z, _), (t, _) = centred(p.z, True), centred(p.t, True)

    def objective(v):
        return np.square(t - z @ v).sum() + strength * np.square(v - p.start).sum()

    other = weight + 1e-2 * np.random.default_rng(seed).normal(size=weight.shape)
    assert objective(weight) < objective(other)


@given(
    seed=st.integers(0, 1000),
    order=st.permutations(range(8)),
    ridge=st.sampled_from([0.0]),
    solver=st.sampled_from(SOLVERS),
    singular=st.sampled_from([None, *SINGULARITIES]),
)
def test_removing_more_never_lowers_the_residual(seed, order, ridge, solver, singular):
    p = problem(200, 8, 3, seed=seed)
    change, tokens = SINGULARITIES[singular] if singular else (lambda z: z, 200)
    z, t = change(p.z.copy())[:tokens], p.t[:tokens]
    previous = 0.0
    for kept in range(8, 0, -1):
        part = z[:, list(order[:kept])]
        normal = normal_of(part, t, True, kind_for(solver))
        start = tensor(p.start[list(order[:kept])])
        weight = start + solve(normal, start, tensor(ridge), solver).change
        residual = float(normal.error(weight, normal.mean_t - normal.mean_z @ weight))
        assert residual >= previous - 1e-8 * normal.target_energy
        previous = residual


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_enormous_ridge_keeps_the_weights(solver):
    p = problem(200, 8, 3)
    found = fitted(p, solver, 1e12, True)
    torch.testing.assert_close(found.weight, tensor(p.start), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.bias, tensor(p.t.mean(0) - p.z.mean(0) @ p.start), rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("ridge", [0, 0.05])
def test_fit_solves_and_validates(solver, affine, ridge):
    """Weights and bias as scipy finds them; errors as a naive loop over the held-out parts finds them."""
    p = problem(200, 8, 3, noise=1.0)
    bias = p.bias if affine else np.zeros_like(p.bias)
    p = type(p)(p.z, p.t, p.start, bias)
    found = fitted(p, solver, ridge, affine)
    want, want_bias = least_squares(p.z, p.t, p.start, bias, affine=affine, ridge=absolute(ridge, p.z, affine))
    torch.testing.assert_close(found.weight, tensor(want), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(found.bias, tensor(want_bias), rtol=1e-7, atol=1e-8)
    before = after = energy = 0.0
    for number in range(4):
        held = np.arange(200) % 4 == number
        z, t = p.z[~held], p.t[~held]
        weight, shift = least_squares(z, t, p.start, bias, affine=affine, ridge=absolute(ridge, z, affine))
        before += squares(p.z[held], p.t[held], p.start, bias)
        after += squares(p.z[held], p.t[held], weight, shift)
        energy += np.square(centred(p.t[held], affine)[0]).sum()
    assert found.before == pytest.approx(before / energy, rel=1e-7)
    assert found.after == pytest.approx(after / energy, rel=1e-7)
    assert found.target_energy == pytest.approx(np.square(centred(p.t, affine)[0]).sum() / 200)
    assert found.ridge == ridge
    assert found.rank == 8


def test_without_splits_nothing_is_validated():
    p = problem(200, 8, 3)
    normal = normal_of(p.z, p.t, True, Moments)
    found = fit(normal, [], tensor(p.start), tensor(p.bias), ridge=0.1)
    assert isnan(found.before)
    assert isnan(found.after)
    want, _ = least_squares(p.z, p.t, p.start, p.bias, affine=True, ridge=absolute(0.1, p.z, True))
    torch.testing.assert_close(found.weight, tensor(want), rtol=1e-7, atol=1e-8)
    automatic = fit(normal, [], tensor(p.start), tensor(p.bias))
    assert bool(torch.isfinite(automatic.weight).all())


@pytest.mark.parametrize("solver", ["eigh", "lstsq"])
@pytest.mark.parametrize("ridge", [0, 0.1])
def test_condition_is_that_of_the_system(solver, ridge):
    p = problem(200, 8, 3, condition=100)
    z, _ = centred(p.z, True)
    system = z.T @ z + absolute(ridge, p.z, True) * np.eye(8)
    assert fitted(p, solver, ridge, True).condition == pytest.approx(np.linalg.cond(system), rel=1e-4)


@pytest.mark.parametrize("ridge", [0, 0.1])
def test_condition_from_cholesky_is_a_lower_bound(ridge):
    p = problem(200, 8, 3, condition=100)
    z, _ = centred(p.z, True)
    condition = fitted(p, "cholesky", ridge, True).condition
    assert 1 <= condition <= np.linalg.cond(z.T @ z + absolute(ridge, p.z, True) * np.eye(8)) * (1 + 1e-9)


def held_out(p, affine, ridge, folds=4):
    """Sums of squares on the held-out folds by hand, on the rows: (unchanged, bias alone refitted, updated with this ridge)."""
    errors = np.zeros(3)
    for fold in range(folds):
        held = np.arange(len(p.z)) % folds == fold
        z, t = p.z[~held], p.t[~held]
        weight, bias = least_squares(z, t, p.start, p.bias, affine=affine, ridge=absolute(ridge, z, affine))
        moved = t.mean(0) - z.mean(0) @ p.start if affine else p.bias
        answers = [(p.start, p.bias), (p.start, moved), (weight, bias)]
        errors += [squares(p.z[held], p.t[held], *answer) for answer in answers]
    return errors


# name -> (tokens, channels, outputs, noise), the ridge that the data asks for differs
RIDGED = {
    "no noise": (200, 8, 3, 1e-4),
    "little noise": (120, 20, 5, 0.3),
    "noise": (60, 20, 4, 3.0),
    "much noise": (240, 20, 4, 6.0),
    "as many outputs as the sketch": (60, 10, SKETCH, 2.0),
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", RIDGED)
def test_the_chosen_ridge_is_the_best_of_all(name, affine, solver):
    """Brute force over every ridge, by SVD on the rows. The start is near the truth, so noise asks for a stronger ridge."""
    tokens, channels, out, noise = RIDGED[name]
    p = problem(tokens, channels, out, noise=noise, mean=1.0 if affine else 0.0)
    p = type(p)(p.z, p.t if affine else p.t - p.t.mean(0), p.start, p.bias if affine else np.zeros_like(p.bias))
    errors = {ridge: held_out(p, affine, ridge)[2] for ridge in RIDGES}
    unchanged, bias_only, _ = held_out(p, affine, RIDGES[0])
    found = fitted(p, solver, "auto", affine)
    assert min(errors.values()) < min(unchanged, bias_only), "the guard has no say here"
    assert found.ridge == min(errors, key=errors.get)


def test_the_ridges_of_these_problems_differ():
    """Negative control: one ridge for all would fail the test above."""
    chosen = {name: fitted(problem(*sizes[:3], noise=sizes[3]), "auto", "auto", True).ridge for name, sizes in RIDGED.items()}
    assert len(set(chosen.values())) >= 4, chosen
    assert chosen["no noise"] == min(RIDGES)


@pytest.mark.parametrize("noise", [0.05, 1.0, 5.0])
def test_a_sketch_of_many_outputs_chooses_a_ridge_as_good(noise):
    """With more outputs than the sketch has columns, the choice is random but nearly the best."""
    p = problem(90, 12, 3 * SKETCH, noise=noise)
    errors = {ridge: held_out(p, True, ridge)[2] for ridge in RIDGES}
    assert errors[fitted(p, "auto", "auto", True).ridge] <= 1.03 * min(errors.values())


def test_a_sketch_has_few_columns_and_the_energy_of_all_outputs():
    weight = torch.randn(5, 10 * SKETCH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sketch = sketch_of(weight)
    assert sketch.shape == (10 * SKETCH, SKETCH)
    energy = float((weight @ sketch).square().sum() / weight.square().sum())
    assert energy == pytest.approx(1.0, abs=0.2)
    assert torch.equal(sketch_of(weight[:, :SKETCH]), torch.eye(SKETCH, dtype=torch.float64))


def test_the_guard_keeps_the_weights_where_no_ridge_helps():
    """Targets that have nothing to do with the rows, and weights at zero: whatever is fitted is chance."""
    generator = np.random.default_rng(3)
    p = problem(40, 20, 3)
    p = type(p)(p.z, generator.normal(size=(40, 3)), np.zeros((20, 3)), np.zeros(3))
    unchanged, bias_only, _ = held_out(p, True, 1.0)
    assert all(held_out(p, True, ridge)[2] > min(unchanged, bias_only) for ridge in RIDGES), "no ridge helps"
    found = fitted(p, "auto", "auto", True)
    assert found.verdict is Verdict.KEPT_BASELINE
    assert found.ridge == inf
    assert torch.equal(found.weight, tensor(p.start))
    assert found.after == pytest.approx(min(unchanged, bias_only) / squares_of_targets(p))
    assert found.before == pytest.approx(unchanged / squares_of_targets(p))
    assert fitted(p, "auto", 0.01, True).verdict is Verdict.RIDGED, "a number is used as it is"


@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_the_guard_moves_the_bias_only_where_that_helps(shift):
    """The same chance fit; targets with a mean ask for a new bias, targets without one for none."""
    generator = np.random.default_rng(3)
    p = problem(40, 20, 3)
    t = generator.normal(size=(40, 3))
    p = type(p)(p.z, t - t.mean(0) + shift, np.zeros((20, 3)), np.zeros(3))
    found = fitted(p, "auto", "auto", True)
    assert found.verdict is Verdict.KEPT_BASELINE
    torch.testing.assert_close(found.bias, torch.full((3,), shift, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def damped(p, drift, affine, solver, **options):
    """`fit_damped` of a problem's target and of a drift beside it."""
    both = type(p)(p.z, damped_target(tensor(p.t), tensor(p.t + drift)).numpy(), p.start, p.bias)
    kind = kind_for(solver)
    data = normal_of(both.z, both.t, affine, kind), splits_of(both, affine, kind)
    return fit_damped(*data, tensor(p.start), tensor(p.bias), solver=solver, **options)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("ridge", [0.0, 0.01, 1.0, "auto"])
def test_the_damped_fit_equals_scipy_on_rows(solver, affine, ridge):
    """The own output and three tenths of the drift with one ridge, half of the drift with a ridge of 1; with a bias, of the
    drift without its mean."""
    p = problem(200, 8, 3)
    drift = 2 + np.random.default_rng(5).normal(size=p.t.shape) + p.z @ np.random.default_rng(6).normal(size=p.start.shape)
    found = damped(p, drift, affine, solver, ridge=ridge)
    drift -= affine * drift.mean(0)
    first = type(p)(p.z, p.t + 0.3 * drift, p.start, p.bias)
    alone = fitted(first, solver, ridge, affine)
    unit = absolute(1, p.z, affine)
    weight, bias = least_squares(p.z, first.t, p.start, p.bias, affine=affine, ridge=alone.ridge * unit)
    zeros = np.zeros_like(p.start), np.zeros_like(p.bias)
    more, moved = least_squares(p.z, 0.5 * drift, *zeros, affine=affine, ridge=unit)
    np.testing.assert_allclose(found.weight.numpy(), weight + more, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(found.bias.numpy(), bias + moved, rtol=1e-6, atol=1e-8)
    assert (found.ridge, found.before, found.after) == pytest.approx(
        (alone.ridge, alone.before, alone.after), rel=1e-9, nan_ok=True
    )


@pytest.mark.parametrize("affine", [True, False])
def test_without_drift_the_damped_fit_is_the_plain_one(affine):
    p = problem(200, 8, 3)
    found, plain = damped(p, np.zeros_like(p.t), affine, "auto", ridge="auto"), fitted(p, "auto", "auto", affine)
    torch.testing.assert_close(found.weight, plain.weight, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.bias, plain.bias, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kept", [True, False])
def test_the_mean_of_the_drift_is_left_where_there_is_a_bias(kept):
    """Whether the weights are kept or changed, the mean of the output is that of the own output."""
    p = problem(40, 30, 3) if kept else problem(200, 8, 3)
    own = type(p)(p.z, 5 + (p.z @ p.start if kept else p.t), p.start, p.bias)
    drift = 7 + np.random.default_rng(5).normal(size=p.t.shape)
    found = damped(own, drift, True, "auto", ridge="auto")
    assert (found.ridge == inf) == kept
    np.testing.assert_allclose((p.z @ found.weight.numpy() + found.bias.numpy()).mean(0), own.t.mean(0), rtol=1e-9)


@pytest.mark.parametrize("enough", [True, False])
def test_the_damped_fit_keeps_the_weights_where_they_are_best(enough):
    """The own output is met exactly, and the drift is noise: nothing may move."""
    p = problem(40, 30, 3, noise=0)
    exact = type(p)(p.z, p.z @ p.start + p.bias, p.start, p.bias)
    noise = np.random.default_rng(5).normal(size=p.t.shape)
    found = damped(exact, noise - noise.mean(0), True, "auto", ridge="auto", enough=enough)
    torch.testing.assert_close(found.weight, tensor(p.start), rtol=0, atol=0)
    assert found.ridge == inf


def test_a_whole_that_is_nothing_leaves_everything_as_it_was():
    """The stream after the layer is that before it: what the layer adds was rounded away."""
    p = problem(200, 8, 3)
    found = damped(p, -p.t, True, "auto", ridge="auto")
    torch.testing.assert_close(found.weight, tensor(p.start), rtol=0, atol=0)
    torch.testing.assert_close(found.bias, tensor(p.bias), rtol=0, atol=0)
    assert found.verdict is Verdict.NOTHING_HELD_OUT


def squares_of_targets(p, folds=4):
    """What held-out errors are relative to: the centred energy of the targets, fold by fold."""
    parts = [p.t[np.arange(len(p.t)) % folds == fold] for fold in range(folds)]
    return sum(np.square(part - part.mean(0)).sum() for part in parts)


def test_auto_leaves_perfect_weights_alone():
    """Targets that the start meets exactly: no update can be better."""
    p = problem(200, 8, 3)
    t = p.z @ p.start + p.bias
    found = fitted(type(p)(p.z, t, p.start, p.bias), "auto", "auto", True)
    torch.testing.assert_close(found.weight, tensor(p.start), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.bias, tensor(p.bias), rtol=1e-6, atol=1e-6)


# Layers whose input has drifted


def in_four(tokens):
    """Rows in order, a quarter in each fold."""
    return TokenIndex(torch.arange(tokens), (tokens // 4,) * 4)


def drifted(tokens=3000, channels=7, out=90, noise=0.05, seed=0):
    """(new input, old input, weight [channels, out], bias [out], statistics in four folds)."""
    generator = np.random.default_rng(seed)
    old = rows(tokens, channels, seed=seed)
    new = old @ (np.eye(channels) + 0.3 * generator.normal(size=(channels, channels))) + 1
    new += noise * generator.normal(size=new.shape)
    weight, bias = generator.normal(size=(channels, out)), generator.normal(size=out)
    folds = Folds(4)
    folds.update(torch.from_numpy(new)[None], torch.from_numpy(old)[None], in_four(tokens))
    return new, old, weight, bias, folds


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("ridge", [0, 0.1])
def test_drift_is_undone_as_by_least_squares_on_the_outputs(affine, ridge):
    new, old, weight, bias, folds = drifted()
    found, offset = drift_fitted(folds, weight, bias, affine, ridge)
    damp = absolute(ridge, new, affine)
    want, moved = least_squares(new, old @ weight + bias * affine, weight, bias, affine=affine, ridge=damp)
    torch.testing.assert_close(found, torch.from_numpy(want), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(offset, torch.from_numpy(moved), rtol=1e-6, atol=1e-6)


def test_the_ridge_of_a_drift_is_found():
    new, old, weight, bias, folds = drifted()
    found, offset = (part.numpy() for part in drift_fitted(folds, weight, bias, True, "auto"))
    target = old @ weight + bias
    best, moved = least_squares(new, target, weight, bias, affine=True)
    assert squares(new, target, found, offset) < 1.05 * squares(new, target, best, moved)
    assert squares(new, target, found, offset) < 0.2 * squares(new, target, weight, bias)


def drift_fitted(folds, weight, bias, affine, ridge):
    all_data, splits = folds.normals(affine=affine, channels=len(weight))
    return fit_drift(all_data, splits, torch.from_numpy(weight), torch.from_numpy(bias), ridge=ridge)


def test_an_input_that_did_not_drift_changes_nothing():
    _, old, weight, bias, _ = drifted(tokens=40)
    folds, same = Folds(4), torch.from_numpy(old)
    folds.update(same[None], same[None], in_four(40))
    found, offset = fit_drift(*folds.normals(affine=True, channels=7), torch.from_numpy(weight), torch.from_numpy(bias))
    torch.testing.assert_close(found, torch.from_numpy(weight), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(offset, torch.from_numpy(bias), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "errors", [(nan, nan, nan), (1.0, 1.0, nan), (nan, 1.0, 0.5), (1.0, nan, 0.5), (inf, nan, nan), (-nan, 2.0, 1.0)]
)
def test_errors_that_are_no_numbers_decide_nothing(errors, monkeypatch):
    """A comparison with NaN is neither true nor false: the weights stay."""
    monkeypatch.setattr(ridge_module, "held_out_errors", lambda *_: (errors, None))
    monkeypatch.setattr(ridge_module, "best_ridge", lambda *_: 0.1)
    split = (object(), object())
    weight, bias = torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    assert ridge_module.decide([split], weight, bias, "auto", "auto", enough=True).ridge == inf
    monkeypatch.setattr(ridge_module, "held_out_errors", lambda *_: ((1.0, 0.9, 0.5), None))
    assert ridge_module.decide([split], weight, bias, "auto", "auto", enough=True).ridge == 0.1, "negative control"


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("rows_of_folds", [(10, 10, 10, 10), (1, 37, 1, 1), (40,), (30, 0, 10)])
def test_both_parts_of_a_split_give_what_is_left_of_all_rows(affine, rows_of_folds):
    """`fit` solves for all rows with what the held-out errors leave; the folds have different means, sizes and weights."""
    generator = np.random.default_rng(3)
    fold = np.repeat(np.arange(len(rows_of_folds)), rows_of_folds)
    x = generator.normal(size=(40, 5)) + 3 * fold[:, None]
    y = generator.normal(size=(40, 3)) - fold[:, None]
    row_weights = torch.from_numpy(generator.uniform(0.5, 2, size=40))
    folds = Folds(len(rows_of_folds))
    index = TokenIndex.of(torch.ones(1, 40, dtype=torch.bool), torch.from_numpy(fold), len(rows_of_folds))
    folds.update(torch.from_numpy(x)[None], torch.from_numpy(y)[None], index, row_weights[None])
    all_data, splits = folds.normals(affine=affine, channels=5)
    weight, bias = torch.from_numpy(generator.normal(size=(5, 3))), torch.zeros(3, dtype=torch.float64)
    _, rest = ridge_module.held_out_errors(splits, weight, bias, 0.1, "auto")
    if len(rows_of_folds) == 1:
        assert rest is None
    else:
        torch.testing.assert_close(rest, all_data.cross - all_data.gram @ weight, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("noise", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("start", RIDGES)
def test_the_search_ends_at_the_same_ridge_wherever_it_begins(start, noise, monkeypatch):
    """Where the error falls and rises once, as it does here; the middle is only where it usually begins."""
    generator = np.random.default_rng(5)
    x = rows(160, 40, condition=1e3, seed=5)
    y = x @ generator.normal(size=(40, 6)) + noise * generator.normal(size=(160, 6))
    folds = Folds(4)
    folds.update(torch.from_numpy(x)[None], torch.from_numpy(y)[None], in_four(160))
    _, splits = folds.normals(affine=True, channels=40)
    weight, bias = torch.zeros(40, 6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    errors = [ridge_module.held_out_errors(splits, weight, bias, ridge, "auto")[0][-1] for ridge in RIDGES]
    best = int(np.argmin(errors))
    tried, real = [], ridge_module.absolute
    monkeypatch.setattr(ridge_module, "absolute", lambda ridge, normal: tried.append(ridge) or real(ridge, normal))
    assert ridge_module.best_ridge(splits, weight, bias, "auto", start) == RIDGES[best]
    # The one it ends at, its neighbours, and those on the way.
    assert len(set(tried)) <= abs(RIDGES.index(start) - best) + 3
    assert start in tried


def test_a_few_factors_are_kept_and_only_of_single_ridges(monkeypatch):
    gram = torch.eye(5, dtype=torch.float64)
    spectrum, computed = Spectrum(gram, 9), []
    real = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda matrix: computed.append(matrix.shape) or real(matrix))
    ridge = torch.tensor(0.1, dtype=torch.float64)
    for _ in range(3):
        torch.testing.assert_close(spectrum.cholesky(ridge)[0] ** 2, gram + 0.1 * gram)
    assert len(computed) == 1
    assert spectrum.cholesky(ridge[None])[0].shape == (1, 5, 5)
    for number in range(KEPT):
        spectrum.cholesky(ridge + number + 1)
    assert len(computed) == 2 + KEPT
    spectrum.cholesky(ridge)
    assert len(computed) == 3 + KEPT, "the oldest was dropped"
    monkeypatch.setattr(normal_module, "KEPT_CHANNELS", 4)
    spectrum.cholesky(ridge)
    assert len(computed) == 4 + KEPT, "factors of wide matrices are not kept"
