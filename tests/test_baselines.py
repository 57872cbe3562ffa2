"""The baselines against naive solutions of their own objectives, and their inputs against plain hooks on whole models."""

import copy
import dataclasses

import numpy as np
import pytest
import reference
import scipy.linalg
import scipy.sparse.linalg
import torch

import liar
from benchmarks.baselines import RULES, SOLVERS, Rule, SiteData, fine_tuning, mask_tuning
from benchmarks.baselines.apply import apply_step
from benchmarks.baselines.closed_form import repair
from liar.testing import tiny_batches, tiny_model

CLOSED_FORM = tuple(SOLVERS)
NAMES = (*CLOSED_FORM, "ours_no_refit", "ours_residual_stream", "ours", "ours_created_bias", "fine_tuning")
NEEDS = frozenset({"dense_inputs", "inputs", "kept_inputs", "dense_sum", "residual"})


def site_data(*, kind="heads", bias=True, tokens=300, units=4, width=3, out=5, whole=False, rank=None, seed=0):
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
    return SiteData(
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


def same(result, expected, tolerance=1e-8):
    torch.testing.assert_close(result, torch.as_tensor(expected), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bias", [True, False])
def test_bias_moves_the_mean_of_what_went(bias):
    data = site_data(bias=bias)
    z, _, w, b, kept, _ = numpy_of(data)
    weight, result = SOLVERS["bias"].solve(data)
    same(weight, w[kept])
    same(result, np.broadcast_to(b, w.shape[1]) + z.mean(0)[~kept] @ w[~kept])


@pytest.mark.parametrize("bias", [True, False])
def test_liar_is_the_best_linear_map_of_the_kept_dense_inputs(bias):
    data = site_data(bias=bias)
    z, _, w, b, kept, _ = numpy_of(data)
    weight, result = SOLVERS["liar"].solve(data)
    expected, intercept = reference.least_squares(z[:, kept], z @ w + b, w[kept], np.zeros(w.shape[1]), affine=bias)
    same(weight, expected)
    if bias:
        same(result, intercept)
        q, p = reference.interpolation(z, kept)
        same(weight, w[kept] + q @ w[~kept])
        same(result, b + (p @ w[~kept]).ravel())
    else:
        assert result is None


def test_liar_takes_the_interpolation_of_least_norm():
    """Fewer dimensions than kept channels: of all Q that are equally good, the pseudo-inverse's."""
    data = site_data(rank=4)
    z, _, w, _, kept, _ = numpy_of(data)
    covariance = np.cov(z, rowvar=False)
    q = np.linalg.pinv(covariance[np.ix_(kept, kept)], rcond=1e-10, hermitian=True) @ covariance[np.ix_(kept, ~kept)]
    same(SOLVERS["liar"].solve(data)[0], w[kept] + q @ w[~kept], 1e-6)


def test_grail_is_a_ridge_regression_of_all_channels_on_the_kept():
    data = site_data()
    _, x, w, b, kept, _ = numpy_of(data)
    ridge = 1e-3 * np.square(x[:, kept]).sum(0).mean()
    rows = np.concatenate([x[:, kept], np.sqrt(ridge) * np.eye(kept.sum())])
    mapping = scipy.linalg.lstsq(rows, np.concatenate([x, np.zeros((kept.sum(), x.shape[1]))]))[0]
    weight, bias = SOLVERS["grail"].solve(data)
    same(weight, mapping @ w)
    same(bias, b)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [None, 4])
def test_kprune_is_least_squares_on_the_rows(bias, rank):
    data = site_data(bias=bias, rank=rank)
    _, x, _, _, kept, target = numpy_of(data)
    weight, result = SOLVERS["kprune"].solve(data)
    same(weight, scipy.linalg.lstsq(x[:, kept], target, cond=1e-6)[0], 1e-6)
    assert (result is None) if not bias else result is data.bias


def test_kprune_with_a_ridge_on_augmented_rows():
    data = site_data()
    _, x, w, _, kept, target = numpy_of(data)
    ridge = 0.01 * np.square(x[:, kept]).sum(0).mean()
    rows = np.concatenate([x[:, kept], np.sqrt(ridge) * np.eye(kept.sum())])
    weight, result = SOLVERS["kprune_ridge"].solve(data)
    same(weight, scipy.linalg.lstsq(rows, np.concatenate([target, np.sqrt(ridge) * w[kept]]))[0])
    assert result is data.bias


@pytest.mark.parametrize("name", ["osscar", "osscar_fullseq"])
def test_osscar_is_a_damped_fit_of_what_the_dense_weights_give(name):
    """Of the pruned stream's inputs by default, of the dense model's with the option."""
    data = site_data()
    z, x, w, _, kept, _ = numpy_of(data)
    target = x if name == "osscar" else z
    own, shared = 0.01 * np.square(x).sum(0).mean(), 0.01 * (x * target).sum(0).mean()
    weight, _ = SOLVERS[name].solve(data)

    def gradient(v):
        """Gradient of |x_u V - target w|^2 / 2 + own |V|^2 / 2 - shared <V, w_u>."""
        return x[:, kept].T @ (x[:, kept] @ v - target @ w) + own * v - shared * w[kept]

    same(torch.from_numpy(gradient(weight.numpy()) / np.abs(gradient(w[kept])).max()), np.zeros(weight.shape))


def test_rcpu_is_the_best_rotation_of_the_kept_weights():
    data = site_data()
    z, x, w, _, kept, _ = numpy_of(data)
    weight, result = SOLVERS["rcpu"].solve(data)
    expected = w[kept] @ scipy.linalg.orthogonal_procrustes(x[:, kept] @ w[kept], z @ w)[0]
    same(weight, expected)
    same(weight @ weight.T, w[kept] @ w[kept].T)
    assert result is data.bias


@pytest.mark.parametrize(("kind", "width"), [("heads", 3), ("neurons", 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_mask_tuning_against_the_explicit_design(kind, width, bias):
    data = site_data(kind=kind, width=width, bias=bias, tokens=60)
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
    weight, result = SOLVERS["mask_tuning"].solve(data)
    same(weight, scales[unit, None] * w, 1e-3)
    assert result is data.bias


def test_mask_tuning_moves_where_the_solvers_own_limit_would_tune_nothing():
    """SciPy stops after as many iterations as there are scales, and says so (7): such scales are refused."""
    data = site_data(kind="neurons", units=48, width=1, tokens=400)
    spread = torch.logspace(0, -1, 48, dtype=torch.float64)
    target = data.residual + data.bias + data.dense_inputs * spread @ data.weight
    data = dataclasses.replace(data, kept_inputs=(data.inputs * spread)[:, data.kept], dense_sum=target)
    gram, right = mask_tuning.normal_equations(data)
    stopped = scipy.sparse.linalg.lsmr(gram.numpy(), (right - gram.sum(1)).numpy(), damp=1)[1]
    assert stopped == 7
    scales = mask_tuning.tuned(gram, right)
    assert mask_tuning.accepted(scales)
    assert (scales - 1).abs().max() > 0.01


def test_mask_tuning_refuses_wild_scales():
    assert mask_tuning.accepted(torch.tensor([10.0, -10.0]))
    assert not mask_tuning.accepted(torch.tensor([1.0, 10.1]))
    assert not mask_tuning.accepted(torch.tensor([1.0, torch.nan]))
    data = site_data(kind="neurons", width=1)
    far = dataclasses.replace(data, dense_sum=1000 * data.dense_sum)
    same(SOLVERS["mask_tuning"].solve(far)[0], data.kept_weight)


@pytest.mark.parametrize("name", CLOSED_FORM)
def test_a_whole_site_of_an_undisturbed_stream_stays(name):
    """Not only because such a site is skipped: the mathematics says so."""
    data = site_data(whole=True)
    still = dataclasses.replace(
        data,
        inputs=data.dense_inputs,
        kept_inputs=data.dense_inputs,
        residual=data.dense_sum - data.dense_inputs @ data.weight - data.bias,
    )
    weight, bias = SOLVERS[name].solve(still)
    same(weight, data.weight, 1e-5)
    same(bias, data.bias, 1e-5)


@pytest.fixture(scope="module", params=["bert", "llama"])
def case(request):
    """(model, batches, mask) of a tiny model."""
    model = tiny_model(request.param)
    batches = tiny_batches(model, batches=6, sequences=16)
    return model, batches, liar.select(model, batches, keep=0.6, criterion="fluctuation", widths="balanced", progress=False)


def hidden(model, batches):
    with torch.no_grad():
        return torch.cat([model(**batch)[0][batch["attention_mask"].bool()] for batch in batches])


@pytest.mark.parametrize("name", NAMES)
def test_every_rule_makes_a_smaller_model_that_runs(case, name):
    model, batches, mask = case
    assert set(RULES) == set(NAMES)
    before = copy.deepcopy(model.state_dict())
    changed, cut = copy.deepcopy(model), copy.deepcopy(model)
    RULES[name](changed, mask, batches)
    liar.remove(cut, mask)
    assert hidden(changed, batches).isfinite().all()
    weights = lambda other: {key: value.shape for key, value in other.state_dict().items() if key.endswith("weight")}  # noqa: E731
    assert weights(changed) == weights(cut)
    created = set(changed.state_dict()) - set(cut.state_dict())
    assert bool(created) == (name in ("bias", "ours_created_bias") and model.config.model_type == "llama")
    assert (hidden(changed, batches) - hidden(cut, batches)).abs().max() < 1e-6 if name == "mask_only" else True
    assert (hidden(changed, batches) - hidden(cut, batches)).abs().max() > 1e-3 if name != "mask_only" else True
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in changed.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_keeping_everything_changes_nothing(case, name):
    model, batches, _ = case
    whole = {site.name: torch.ones(site.units, dtype=torch.bool) for site in liar.discover(model).sites}
    changed = copy.deepcopy(model)
    RULES[name](changed, liar.Mask.of(whole, liar.discover(model)), batches)
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


def test_rules_are_given_what_plain_hooks_see(case):
    model, batches, mask = case
    given = []

    def solve(data):
        given.append(data)
        return 0.9 * data.kept_weight, data.bias

    changed = copy.deepcopy(model)
    repair(changed, mask, batches, Rule(solve, NEEDS))
    dense, pruned = hooked(model, batches), hooked(changed, batches)
    names = [site.name for site in liar.discover(model).sites]
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


def test_only_what_a_rule_needs_is_gathered(case):
    model, batches, mask = case
    given = []
    rule = Rule(lambda data: (given.append(data), (data.kept_weight, data.bias))[1], frozenset({"kept_inputs"}))
    repair(copy.deepcopy(model), mask, batches, rule)
    assert all(len(data.kept_inputs) for data in given)
    assert not any(len(rows) for data in given for rows in (data.dense_inputs, data.inputs, data.dense_sum, data.residual))


def test_nothing_is_kept_for_longer_than_its_site(case, monkeypatch):
    model, batches, mask = case
    stores = []
    original = liar.runtime.ActivationStore.discard

    def discard(store, *series):
        stores.append(store)
        original(store, *series)

    monkeypatch.setattr(liar.runtime.ActivationStore, "discard", discard)
    repair(copy.deepcopy(model), mask, batches, Rule(lambda data: (data.kept_weight, data.bias), NEEDS))
    assert sorted(stores[-1].names()) == ["dense", "pruned"]


def test_fine_tuning_brings_the_stream_nearer(case):
    model, batches, mask = case
    errors = {}
    for name in ("mask_only", "fine_tuning"):
        changed = copy.deepcopy(model)
        RULES[name](changed, mask, batches)
        errors[name] = float((hidden(changed, batches) - hidden(model, batches)).square().mean())
    assert errors["fine_tuning"] < 0.99 * errors["mask_only"], errors


def test_fine_tuning_lowers_its_own_loss(case):
    """At every site, on the stream that the sites before it have left."""
    model, batches, mask = case
    errors = []

    class Measured(fine_tuning.FineTune):
        def error(self, site):
            with torch.no_grad():
                return sum(float(fine_tuning.stream_error(site, batch)) for batch in site.walk.batches)

        def repair(self, site):
            before = self.error(site)
            discard, site.discard = site.discard, lambda series: None
            super().repair(site)
            errors.append((before, self.error(site)))
            discard("target")

    apply_step(copy.deepcopy(model), mask, fine_tuning.small_batches(batches), Measured())
    assert len(errors) == len(mask.masks)
    assert all(after < 0.99 * before for before, after in errors), errors


def test_fine_tuning_leaves_the_dense_model_alone_where_a_site_keeps_all(case):
    """Such a site shares its parameters with the user's model until it is trained."""
    model, batches, mask = case
    last = list(mask.masks)[-1]
    masks = {name: torch.ones_like(rows) if name == last else rows for name, rows in mask.masks.items()}
    changed, before = copy.deepcopy(model), copy.deepcopy(model)
    trained = []

    class Compared(fine_tuning.FineTune):
        def repair(self, site):
            super().repair(site)
            trained.append(site.name)
            expected = before.get_submodule(site.dense_site.module).weight
            assert torch.equal(site.dense_consumer.weight, expected)
            assert site.consumer.weight.shape != expected.shape or not torch.equal(site.consumer.weight, expected)

    apply_step(changed, liar.Mask(masks), fine_tuning.small_batches(batches), Compared())
    assert trained[-1] == last


def test_fine_tuning_takes_every_sequence_once(case):
    _, batches, _ = case
    steps = fine_tuning.small_batches([{"input_ids": torch.arange(2400).reshape(12, 200)}, *batches])
    assert [tuple(batch["input_ids"].shape) for batch in steps[:6]] == [(2, 200)] * 6
    assert torch.equal(torch.cat([batch["input_ids"] for batch in steps[:6]]).flatten(), torch.arange(2400))
    assert sum(len(batch["input_ids"]) for batch in steps[6:]) == sum(len(batch["input_ids"]) for batch in batches)
    assert all(batch["attention_mask"].shape == batch["input_ids"].shape for batch in steps[6:])
