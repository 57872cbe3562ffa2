"""The rival rules against naive solutions of their own objectives, and their walk against plain hooks on whole models."""

import copy
import dataclasses
import importlib
from pathlib import Path

import numpy as np
import pytest
import reference
import scipy.linalg
import scipy.sparse.linalg
import torch

import liar
from liar.batches import Calibration
from liar.testing import tiny_batches, tiny_model

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
NAMES = ("mask_only", "bias", "mask_tuning", "liar", "grail", "kprune", "osscar_update", "ours", "polish")
CLOSED_FORM = NAMES[:-2]
NEEDS = frozenset({"dense_inputs", "inputs", "kept_inputs", "dense_sum", "residual"})


@pytest.fixture(scope="module")
def rivals():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("rivals")


def site_data(rivals, *, kind="heads", bias=True, tokens=300, units=4, width=3, out=5, whole=False, rank=None, seed=0):
    """A random site whose pruned stream has drifted a little from the dense one; `rank` limits what the inputs span."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    channels = units * width
    dense = draw(tokens, rank or channels) @ draw(rank or channels, channels) + draw(channels)
    keep = torch.ones(units, dtype=torch.bool)
    keep[1 : 1 if whole else 3] = False
    kept = keep.repeat_interleave(width).nonzero().squeeze(1)
    inputs = dense @ (torch.eye(channels, dtype=torch.float64) + 0.05 * draw(channels, channels))
    weight, intercept, stream = draw(channels, out), draw(out) if bias else None, draw(tokens, out)
    return rivals.SiteData(
        kind=kind,
        kept=kept,
        unit=torch.arange(int(keep.sum())).repeat_interleave(width),
        weight=weight,
        bias=intercept,
        dense_inputs=dense,
        inputs=inputs,
        kept_inputs=inputs[:, kept],
        dense_sum=stream + dense @ weight + (intercept if bias else 0),
        residual=stream + 0.1 * draw(tokens, out),
    )


def numpy_of(data):
    """(dense inputs, own inputs, dense weight, bias or 0, kept as bool, residual-inclusive target) as numpy."""
    kept = np.zeros(len(data.weight), bool)
    kept[data.kept] = True
    bias = 0.0 if data.bias is None else data.bias.numpy()
    target = (data.dense_sum - data.residual).numpy() - bias
    return data.dense_inputs.numpy(), data.inputs.numpy(), data.weight.numpy(), bias, kept, target


def same(found, expected, tolerance=1e-8):
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bias", [True, False])
def test_bias_moves_the_mean_of_what_went(rivals, bias):
    data = site_data(rivals, bias=bias)
    z, _, w, b, kept, _ = numpy_of(data)
    weight, found = rivals.SOLVERS["bias"].solve(data)
    same(weight, w[kept])
    same(found, np.broadcast_to(b, w.shape[1]) + z.mean(0)[~kept] @ w[~kept])


@pytest.mark.parametrize("bias", [True, False])
def test_liar_is_the_best_linear_map_of_the_kept_dense_inputs(rivals, bias):
    data = site_data(rivals, bias=bias)
    z, _, w, b, kept, _ = numpy_of(data)
    weight, found = rivals.SOLVERS["liar"].solve(data)
    expected, intercept = reference.least_squares(z[:, kept], z @ w + b, w[kept], np.zeros(w.shape[1]), affine=bias)
    same(weight, expected)
    if bias:
        same(found, intercept)
        q, p = reference.interpolation(z, kept)
        same(weight, w[kept] + q @ w[~kept])
        same(found, b + (p @ w[~kept]).ravel())
    else:
        assert found is None


def test_liar_takes_the_interpolation_of_least_norm(rivals):
    """Fewer dimensions than kept channels: of all Q that are equally good, the pseudo-inverse's."""
    data = site_data(rivals, rank=4)
    z, _, w, _, kept, _ = numpy_of(data)
    covariance = np.cov(z, rowvar=False)
    q = np.linalg.pinv(covariance[np.ix_(kept, kept)], rcond=1e-10, hermitian=True) @ covariance[np.ix_(kept, ~kept)]
    same(rivals.SOLVERS["liar"].solve(data)[0], w[kept] + q @ w[~kept], 1e-6)


def test_grail_is_a_ridge_regression_of_all_channels_on_the_kept(rivals):
    data = site_data(rivals)
    _, x, w, b, kept, _ = numpy_of(data)
    ridge = 1e-3 * np.square(x[:, kept]).sum(0).mean()
    rows = np.concatenate([x[:, kept], np.sqrt(ridge) * np.eye(kept.sum())])
    mapping = scipy.linalg.lstsq(rows, np.concatenate([x, np.zeros((kept.sum(), x.shape[1]))]))[0]
    weight, bias = rivals.SOLVERS["grail"].solve(data)
    same(weight, mapping @ w)
    same(bias, b)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [None, 4])
def test_kprune_is_least_squares_on_the_rows(rivals, bias, rank):
    data = site_data(rivals, bias=bias, rank=rank)
    _, x, _, _, kept, target = numpy_of(data)
    weight, found = rivals.SOLVERS["kprune"].solve(data)
    same(weight, scipy.linalg.lstsq(x[:, kept], target, cond=1e-6)[0], 1e-6)
    assert (found is None) if not bias else found is data.bias


def test_osscar_is_a_damped_fit_of_the_layers_own_dense_output(rivals):
    data = site_data(rivals)
    z, x, w, _, kept, _ = numpy_of(data)
    own, shared = 0.01 * np.square(x).sum(0).mean(), 0.01 * (x * z).sum(0).mean()
    weight, _ = rivals.SOLVERS["osscar_update"].solve(data)

    def slope(v):
        """Gradient of |x_u V - z w|^2 / 2 + own |V|^2 / 2 - shared <V, w_u>."""
        return x[:, kept].T @ (x[:, kept] @ v - z @ w) + own * v - shared * w[kept]

    same(torch.from_numpy(slope(weight.numpy()) / np.abs(slope(w[kept])).max()), np.zeros(weight.shape))


@pytest.mark.parametrize(("kind", "width"), [("heads", 3), ("neurons", 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_mask_tuning_against_the_explicit_design(rivals, kind, width, bias):
    data = site_data(rivals, kind=kind, width=width, bias=bias, tokens=60)
    _, x, w, _, _, target = numpy_of(data)
    x, w, unit = x[:, data.kept], w[data.kept], data.unit.numpy()
    columns = [(x[:, unit == j] @ w[unit == j]).ravel() for j in range(unit.max() + 1)]
    columns += [np.ones(target.size)] if kind == "heads" else []
    design = np.stack(columns, 1)
    gram = design.T @ design
    rows = np.concatenate([gram, np.eye(len(gram))])
    right = np.concatenate([design.T @ (target.ravel() - design.sum(1)), np.zeros(len(gram))])
    scales = 1 + scipy.linalg.lstsq(rows, right)[0][: unit.max() + 1]
    assert np.abs(scales - 1).max() > 0.01
    weight, found = rivals.SOLVERS["mask_tuning"].solve(data)
    same(weight, scales[unit, None] * w, 1e-3)
    assert found is data.bias


def test_mask_tuning_moves_where_the_solvers_own_limit_would_tune_nothing(rivals):
    """SciPy stops after as many iterations as there are scales, and says so (7): such scales are refused."""
    tuning = importlib.import_module("rivals.mask_tuning")
    data = site_data(rivals, kind="neurons", units=48, width=1, tokens=400)
    spread = torch.logspace(0, -1, 48, dtype=torch.float64)
    wanted = data.residual + data.bias + data.dense_inputs * spread @ data.weight
    data = dataclasses.replace(data, kept_inputs=(data.inputs * spread)[:, data.kept], dense_sum=wanted)
    gram, right = tuning.normal_equations(data)
    stopped = scipy.sparse.linalg.lsmr(gram.numpy(), (right - gram.sum(1)).numpy(), damp=1)[1]
    assert stopped == 7
    scales = tuning.tuned(gram, right)
    assert tuning.accepted(scales)
    assert (scales - 1).abs().max() > 0.01


def test_mask_tuning_refuses_wild_scales(rivals):
    tuning = importlib.import_module("rivals.mask_tuning")
    assert tuning.accepted(torch.tensor([10.0, -10.0]))
    assert not tuning.accepted(torch.tensor([1.0, 10.1]))
    assert not tuning.accepted(torch.tensor([1.0, torch.nan]))
    data = site_data(rivals, kind="neurons", width=1)
    far = dataclasses.replace(data, dense_sum=1000 * data.dense_sum)
    same(rivals.SOLVERS["mask_tuning"].solve(far)[0], data.kept_weight)


@pytest.mark.parametrize("name", CLOSED_FORM)
def test_a_whole_site_of_an_undisturbed_stream_stays(rivals, name):
    """Not only because the walk skips it: the mathematics says so."""
    data = site_data(rivals, whole=True)
    still = dataclasses.replace(
        data,
        inputs=data.dense_inputs,
        kept_inputs=data.dense_inputs,
        residual=data.dense_sum - data.dense_inputs @ data.weight - data.bias,
    )
    weight, bias = rivals.SOLVERS[name].solve(still)
    same(weight, data.weight, 1e-5)
    same(bias, data.bias, 1e-5)


@pytest.fixture(scope="module", params=["bert", "llama"])
def guest(request):
    """(model, batches, mask) of a tiny model."""
    model = tiny_model(request.param)
    batches = tiny_batches(model, batches=6, sequences=16)
    return model, batches, liar.select(model, batches, keep=0.6, criterion="fluctuation", scope="layer", progress=False)


def hidden(model, batches):
    with torch.no_grad():
        return torch.cat([model(**batch)[0][batch["attention_mask"].bool()] for batch in batches])


@pytest.mark.parametrize("name", NAMES)
def test_every_rule_makes_a_smaller_model_that_runs(rivals, guest, name):
    model, batches, mask = guest
    assert set(rivals.RULES) == set(NAMES)
    before = copy.deepcopy(model.state_dict())
    changed, cut = copy.deepcopy(model), copy.deepcopy(model)
    rivals.RULES[name](changed, mask, batches)
    liar.slim.remove(cut, mask)
    assert hidden(changed, batches).isfinite().all()
    weights = lambda other: {key: value.shape for key, value in other.state_dict().items() if key.endswith("weight")}  # noqa: E731
    assert weights(changed) == weights(cut)
    created = set(changed.state_dict()) - set(cut.state_dict())
    assert bool(created) == (name == "bias" and model.config.model_type == "llama")
    assert (hidden(changed, batches) - hidden(cut, batches)).abs().max() < 1e-6 if name == "mask_only" else True
    assert (hidden(changed, batches) - hidden(cut, batches)).abs().max() > 1e-3 if name != "mask_only" else True
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in changed.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_keeping_everything_changes_nothing(rivals, guest, name):
    model, batches, _ = guest
    whole = {site.name: torch.ones(site.units, dtype=torch.bool) for site in liar.families.discover(model).sites}
    changed = copy.deepcopy(model)
    rivals.RULES[name](changed, liar.Mask.of(whole, liar.families.discover(model)), batches)
    torch.testing.assert_close(hidden(changed, batches), hidden(model, batches), rtol=0, atol=1e-5)


def hooked(model, batches):
    """{"heads.0": (consumer inputs, residual, consumer outputs), …} with plain hooks on the whole model, real tokens only."""
    seen, handles = {}, []

    def watch(consumer, module, end, kept):
        def on_consumer(_, args, output):
            kept[0].append(args[0])
            kept[2].append(output)

        def on_residual(_, args, output):
            kept[1].append(args[0] if end == "in" else output[0] if isinstance(output, tuple) else output)

        return consumer.register_forward_hook(on_consumer), module.register_forward_hook(on_residual)

    for layer, block in enumerate(reference.blocks(model)):
        for kind, (consumer, module, end) in reference.RESIDUALS[model.config.model_type].items():
            kept = seen[f"{kind}.{layer}"] = ([], [], [])
            handles += watch(block.get_submodule(consumer), block.get_submodule(module), end, kept)
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    rows = lambda values: torch.cat([v[b["attention_mask"].bool()] for v, b in zip(values, batches, strict=True)])  # noqa: E731
    return {name: tuple(rows(values) for values in three) for name, three in seen.items()}


def test_the_walk_sees_what_plain_hooks_see(rivals, guest):
    model, batches, mask = guest
    repair = importlib.import_module("rivals.repair").repair
    given = []

    def solve(data):
        given.append(data)
        return 0.9 * data.kept_weight, data.bias

    changed = copy.deepcopy(model)
    repair(changed, mask, batches, rivals.Rule(solve, NEEDS))
    dense, pruned = hooked(model, batches), hooked(changed, batches)
    names = [site.name for site in liar.families.discover(model).sites]
    assert len(given) == len(names)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # noqa: E731
    for name, data in zip(names, given, strict=True):
        close(data.dense_inputs, dense[name][0])
        close(data.dense_sum, dense[name][1] + dense[name][2])
        close(data.kept_inputs, pruned[name][0])
        close(data.inputs[:, data.kept], data.kept_inputs)
        close(data.residual, pruned[name][1])
        assert data.inputs.shape == data.dense_inputs.shape
        assert data.kind == name.split(".")[0]
        assert data.unit.unique().tolist() == list(range(mask.kept(name)))


def test_the_walk_looks_only_where_a_rule_does(rivals, guest):
    model, batches, mask = guest
    repair = importlib.import_module("rivals.repair").repair
    given = []
    rule = rivals.Rule(lambda data: (given.append(data), (data.kept_weight, data.bias))[1], frozenset({"kept_inputs"}))
    repair(copy.deepcopy(model), mask, batches, rule)
    assert all(len(data.kept_inputs) for data in given)
    assert not any(len(rows) for data in given for rows in (data.dense_inputs, data.inputs, data.dense_sum, data.residual))


def test_polish_brings_the_stream_nearer(rivals, guest):
    model, batches, mask = guest
    errors = {}
    for name in ("mask_only", "polish"):
        changed = copy.deepcopy(model)
        rivals.RULES[name](changed, mask, batches)
        errors[name] = float((hidden(changed, batches) - hidden(model, batches)).square().mean())
    assert errors["polish"] < 0.99 * errors["mask_only"], errors


def test_polish_lowers_its_own_loss(rivals, guest):
    model, batches, mask = guest
    polish, walk_module = (importlib.import_module(f"rivals.{name}") for name in ("polish", "walk"))
    calibration = Calibration.of(batches, model)
    with liar.capture.preserved(model):
        walk = walk_module.Walk(model, mask, calibration, NEEDS)
        student, site = liar.slim.student(walk.blocks[0]), walk.sites(0)[0]
        targets = walk.dense_rows(0)[site.name]["dense_sum"].split([int(keep.sum()) for keep in calibration.keep])
        liar.slim.cut_site(student, site, mask[site.name])
        loss = lambda: sum(float(polish.loss(walk, 0, student, site, i, target)) for i, target in enumerate(targets))  # noqa: E731
        before = loss()
        polish.train(walk, 0, student, site, targets)
        assert loss() < 0.99 * before


def test_polish_takes_every_sequence_once(rivals, guest):
    _, batches, _ = guest
    steps = importlib.import_module("rivals.polish").steps([{"input_ids": torch.arange(2400).reshape(12, 200)}, *batches])
    assert [tuple(batch["input_ids"].shape) for batch in steps[:6]] == [(2, 200)] * 6
    assert torch.equal(torch.cat([batch["input_ids"] for batch in steps[:6]]).flatten(), torch.arange(2400))
    assert sum(len(batch["input_ids"]) for batch in steps[6:]) == sum(len(batch["input_ids"]) for batch in batches)
    assert all(batch["attention_mask"].shape == batch["input_ids"].shape for batch in steps[6:])
