"""Scores against naive loops, and budgets that are met and never exceeded."""

import numpy as np
import pytest
import reference
import torch
from cases import MODELS

import liar
from liar.costs import params
from liar.criteria import CRITERIA, SCOPES, Budget, Units, allocate, scores
from liar.errors import BudgetError, OptionError
from liar.families import discover
from liar.statistics import ChannelMoments
from liar.testing import tiny_batches, tiny_model

PRODUCERS = {
    "bert": {"heads": [f"attention.self.{name}" for name in ("query", "key", "value")], "neurons": ["intermediate.dense"]},
    "llama": {"heads": [f"self_attn.{name}_proj" for name in "qkv"], "neurons": ["mlp.gate_proj", "mlp.up_proj"]},
}


def naive(criterion, model, batches, layer, kind):
    """Unit by unit, channel by channel, from the rows that enter the full model's consumer."""
    block = reference.blocks(model)[layer]
    consumer = block.get_submodule(reference.RESIDUALS[model.config.model_type][kind][0])
    x, w = reference.look(model, batches, layer, kind)["x"], reference.numpy(consumer.weight)
    units = reference.units(model, kind)
    width = w.shape[1] // units
    found = []
    for unit in range(units):
        score = 0.0
        for channel in range(unit * width, (unit + 1) * width):
            if criterion == "fluctuation":
                score += np.var(x[:, channel]) * np.sum(w[:, channel] ** 2)
            if criterion == "wanda":
                score += np.sqrt(np.mean(x[:, channel] ** 2)) * np.sum(np.abs(w[:, channel]))
        if criterion == "magnitude":
            weights = [w[:, unit * width : (unit + 1) * width].ravel()]
            for name in PRODUCERS[model.config.model_type][kind]:
                rows = reference.numpy(block.get_submodule(name).weight)
                per_unit = len(rows) // units
                weights.append(rows[unit * per_unit : (unit + 1) * per_unit].ravel())
            score = np.sqrt(np.mean(np.concatenate(weights) ** 2))
        found.append(score)
    return np.array(found)


@pytest.mark.parametrize("criterion", ["fluctuation", "wanda", "magnitude"])
@pytest.mark.parametrize("name", ["bert", "bert-classifier", "llama", "llama-8q-2kv", "llama-wide-heads"])
def test_scores_equal_naive_loops(criterion, name):
    model = tiny_model(**MODELS[name])
    batches = tiny_batches(model, batches=2)
    layout = discover(model)
    for site in layout.sites:
        moments = ChannelMoments()
        moments.update(torch.from_numpy(reference.look(model, batches, site.layer, site.kind)["x"]))
        known = {"mean": moments.mean, "variance": moments.variance}
        got = scores(criterion, Units.of(model.get_submodule(site.block), site, known))
        want = naive(criterion, model, batches, site.layer, site.kind)
        torch.testing.assert_close(got, torch.from_numpy(want), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("criterion", ["fluctuation", "wanda", "magnitude"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_select_keeps_the_best_units_of_every_site(criterion, name):
    """From end to end: no removed unit scores higher than a kept one of its site."""
    model = tiny_model(**MODELS[name])
    batches = tiny_batches(model)
    mask = liar.select(model, batches, keep=0.5, criterion=criterion, scope="layer", progress=False)
    for site in discover(model).sites:
        want = naive(criterion, model, batches, site.layer, site.kind)
        keep = mask[site.name].numpy()
        assert 0 < keep.sum() < site.units
        assert want[keep].min() > want[~keep].max()


def test_padding_has_no_say():
    model = tiny_model("bert")
    batches = tiny_batches(model)
    other = [{**batch, "input_ids": batch["input_ids"].where(batch["attention_mask"].bool(), 9)} for batch in batches]
    for criterion in ("fluctuation", "wanda"):
        a, b = (liar.select(model, data, keep=0.4, criterion=criterion, progress=False) for data in (batches, other))
        assert a == b


@pytest.mark.parametrize("name", ["bert", "llama-8q-2kv"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("keep", [0.35, 0.5, 0.77, 0.9, 0.999, 1.0, 1])
def test_the_budget_is_met_and_never_exceeded(name, scope, criterion, keep):
    model = tiny_model(**MODELS[name])
    layout = discover(model)
    mask = liar.select(model, tiny_batches(model, batches=1), keep=keep, criterion=criterion, scope=scope, progress=False)
    got = mask.parameters(layout) / layout.parameters
    assert keep - 0.01 <= got <= keep
    assert mask.asked == keep
    for site in layout.sites:
        assert mask.kept(site.name) >= 1
        assert len(mask[site.name]) == site.units
    if keep == 1:
        assert all(mask.whole(site.name) for site in layout.sites)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("scope", SCOPES)
def test_the_least_budget_leaves_one_unit_everywhere(criterion, scope):
    model = tiny_model("bert")
    layout, batches = discover(model), tiny_batches(model, batches=1)
    floor = layout.kept_parameters({site.name: 1 for site in layout.sites}) / layout.parameters
    mask = liar.select(model, batches, keep=floor + 1e-9, criterion=criterion, scope=scope, progress=False)
    assert [mask.kept(site.name) for site in layout.sites] == [1] * 4
    with pytest.raises(
        BudgetError, match=f"the least that is possible is {floor:.4f} of the parameters, with 1 heads, 1 neurons, 1"
    ):
        liar.select(model, batches, keep=floor - 1e-3, criterion=criterion, scope=scope, progress=False)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_layer_scope_keeps_equal_shares(criterion):
    model = tiny_model("llama", num_key_value_heads=4)
    mask = liar.select(model, tiny_batches(model), keep=0.5, criterion=criterion, scope="layer", progress=False)
    for kind in ("heads", "neurons"):
        kept = [mask.kept(f"{kind}.{layer}") for layer in range(2)]
        assert abs(kept[0] - kept[1]) <= 1


def test_global_scope_lets_sites_compete():
    """A site whose units are all alike but for a few keeps few of them."""
    model = tiny_model("bert")
    layout = discover(model)
    budget = Budget.of(layout, params(model), 0.5)
    generator = torch.Generator().manual_seed(0)
    found = {site.name: torch.rand(site.units, generator=generator, dtype=torch.float64) for site in layout.sites}
    found["neurons.0"][:] = 0.1
    found["neurons.0"][:3] = 5.0
    mask = allocate(found, layout, budget, "global", sets={})
    assert mask.kept("neurons.0") < mask.kept("neurons.1")
    assert bool(mask["neurons.0"][:3].all())
    level = allocate(found, layout, budget, "layer", sets={})
    assert abs(level.kept("neurons.0") - level.kept("neurons.1")) <= 1


@pytest.mark.parametrize("scope", SCOPES)
def test_equal_scores_are_no_trouble(scope):
    model = tiny_model("bert")
    layout = discover(model)
    equal = {site.name: torch.ones(site.units, dtype=torch.float64) for site in layout.sites}
    mask = allocate(equal, layout, Budget.of(layout, params(model), 0.5), scope, sets={})
    assert 0.49 < mask.parameters(layout) / layout.parameters <= 0.5


def test_random_is_seeded():
    model = tiny_model("bert")
    torch.manual_seed(0)
    first = liar.select(model, keep=0.5, criterion="random", seed=3)
    torch.manual_seed(1)
    assert liar.select(model, keep=0.5, criterion="random", seed=3) == first
    assert liar.select(model, keep=0.5, criterion="random", seed=4) != first
    assert first["neurons.0"].tolist() != first["neurons.1"].tolist()


def test_weights_alone_need_no_data():
    model = tiny_model("bert")
    assert liar.select(model, keep=0.5, criterion="magnitude") == liar.select(
        model, tiny_batches(model), keep=0.5, criterion="magnitude", progress=False
    )


def test_the_dtype_of_the_model_hardly_matters():
    masks = [
        liar.select(m, tiny_batches(m), keep=0.5, progress=False) for m in (tiny_model(), tiny_model(dtype=torch.bfloat16))
    ]
    agree = sum(int((masks[0][name] == masks[1][name]).sum()) for name in masks[0].keep)
    assert agree > 0.9 * sum(len(keep) for keep in masks[0].keep.values())


@pytest.mark.parametrize("keep", [0, -0.1, 1.0001, float("nan"), float("inf")])
def test_shares_outside(keep):
    with pytest.raises(OptionError, match="expected the share that stays, above 0 and at most 1"):
        liar.select(tiny_model(), keep=keep, criterion="magnitude")


def test_a_slim_model_can_be_selected_from():
    model = tiny_model("llama")
    batches = tiny_batches(model)
    liar.prune(model, batches, keep=0.7, progress=False)
    layout = discover(model)
    mask = liar.select(model, batches, keep=0.8, progress=False)
    assert 0.79 < mask.parameters(layout) / layout.parameters <= 0.8
