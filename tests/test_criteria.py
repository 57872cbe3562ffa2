"""Scores against naive loops, and budgets that are met and never exceeded."""

import numpy as np
import pytest
import reference
import torch
from cases import MODELS

import liar
from liar import options
from liar.errors import BudgetError, OptionError
from liar.models import layout_of
from liar.options import SelectOptions
from liar.selection import CRITERIA, Budget, Criterion, SiteWeights, allocate, params, register_criterion, scores
from liar.statistics import ChannelMoments
from liar.testing import tiny_batches, tiny_model


def naive(criterion, model, batches, layer, kind):
    """Unit by unit, channel by channel, from the rows that enter the full model's consumer."""
    block = reference.blocks(model)[layer]
    consumer = block.get_submodule(reference.RESIDUALS[model.config.model_type][kind][0])
    x, w = reference.activations(model, batches, layer, kind)["x"], reference.numpy(reference.matrix(consumer)).T
    units = reference.units(model, kind)
    width = w.shape[1] // units
    result = []
    for unit in range(units):
        score = 0.0
        for channel in range(unit * width, (unit + 1) * width):
            if criterion == "fluctuation":
                score += np.var(x[:, channel]) * np.sum(w[:, channel] ** 2)
            if criterion == "wanda":
                score += np.sqrt(np.mean(x[:, channel] ** 2)) * np.sum(np.abs(w[:, channel]))
        if criterion == "magnitude":
            weights = [w[:, unit * width : (unit + 1) * width].ravel()]
            for name in reference.PRODUCERS[model.config.model_type][kind]:
                layer_of_unit = block.get_submodule(name)
                own = reference.kept_outputs(layer_of_unit, np.arange(units) == unit)
                weights.append(reference.numpy(reference.matrix(layer_of_unit))[:, own].ravel())
            score = np.sqrt(np.mean(np.concatenate(weights) ** 2))
        result.append(score)
    return np.array(result)


@pytest.mark.parametrize("criterion", ["fluctuation", "wanda", "magnitude"])
@pytest.mark.parametrize("name", ["bert", "bert-classifier", "llama", "llama-8q-2kv", "llama-wide-heads", "gpt2-lm"])
def test_scores_equal_naive_loops(criterion, name):
    model = tiny_model(**MODELS[name])
    batches = tiny_batches(model, batches=2)
    layout = layout_of(model)
    for site in layout.sites:
        moments = ChannelMoments()
        moments.update(torch.from_numpy(reference.activations(model, batches, site.layer, site.kind)["x"]))
        collected = {"mean": moments.mean, "variance": moments.variance}
        got = scores(criterion, SiteWeights.of(model.get_submodule(site.block), site, collected))
        expected = naive(criterion, model, batches, site.layer, site.kind)
        torch.testing.assert_close(got, torch.from_numpy(expected), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("criterion", ["fluctuation", "wanda", "magnitude"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_select_keeps_the_best_units_of_every_site(criterion, name):
    """From end to end: no removed unit scores higher than a kept one of its site."""
    model = tiny_model(**MODELS[name])
    batches = tiny_batches(model)
    mask = liar.select(model, batches, keep=0.5, criterion=criterion, widths="balanced", progress=False)
    for site in layout_of(model).sites:
        expected = naive(criterion, model, batches, site.layer, site.kind)
        kept = mask[site.name].numpy()
        assert 0 < kept.sum() < site.units
        assert expected[kept].min() > expected[~kept].max()


def test_padding_does_not_matter():
    model = tiny_model("bert")
    batches = tiny_batches(model)
    other = [{**batch, "input_ids": batch["input_ids"].where(batch["attention_mask"].bool(), 9)} for batch in batches]
    for criterion in ("fluctuation", "wanda"):
        a, b = (liar.select(model, data, keep=0.4, criterion=criterion, progress=False) for data in (batches, other))
        assert a == b


@pytest.fixture(scope="module")
def prepared():
    """By name: a model and the statistics of all criteria, collected once."""
    models = {name: tiny_model(**MODELS[name]) for name in ("bert", "llama-8q-2kv", "gpt2-lm")}
    return {
        name: (model, liar.collect(model, tiny_batches(model, batches=1), criteria=list(CRITERIA), progress=False))
        for name, model in models.items()
    }


@pytest.mark.parametrize("name", ["bert", "llama-8q-2kv", "gpt2-lm"])
@pytest.mark.parametrize("widths", ["free", "balanced"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_budget_is_met_and_never_exceeded(prepared, name, widths, criterion):
    model, statistics = prepared[name]
    layout = layout_of(model)
    for keep in (0.35, 0.5, 0.77, 0.9, 0.999):
        mask = liar.select(model, statistics, keep=keep, criterion=criterion, widths=widths, progress=False)
        share = mask.parameters(layout) / layout.parameters
        assert keep - 0.01 <= share <= keep
        assert mask.requested == keep
        for site in layout.sites:
            assert mask.kept(site.name) >= 1
            assert len(mask[site.name]) == site.units


@pytest.mark.parametrize("widths", ["free", "balanced", "uniform"])
@pytest.mark.parametrize("keep", [1.0, 1])
def test_all_of_the_budget_keeps_everything(prepared, widths, keep):
    model, statistics = prepared["bert"]
    for criterion in CRITERIA:
        for round_to in (1, 16):
            how = {"criterion": criterion, "widths": widths, "round_to": round_to}
            mask = liar.select(model, statistics, keep=keep, progress=False, **how)
            assert all(mask.keeps_all(site.name) for site in layout_of(model).sites)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("widths", ["free", "balanced"])
def test_the_least_budget_leaves_one_unit_everywhere(prepared, criterion, widths):
    model, statistics = prepared["bert"]
    layout, how = layout_of(model), {"criterion": criterion, "widths": widths, "progress": False}
    floor = layout.kept_parameters({site.name: 1 for site in layout.sites}) / layout.parameters
    mask = liar.select(model, statistics, keep=floor + 1e-9, **how)
    assert [mask.kept(site.name) for site in layout.sites] == [1] * 4
    with pytest.raises(
        BudgetError, match=f"the least that is possible is {floor:.4f} of the parameters, with 1 heads, 1 neurons in a layer"
    ):
        liar.select(model, statistics, keep=floor - 1e-3, **how)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_balanced_widths_keep_equal_shares(criterion):
    model = tiny_model("llama", num_key_value_heads=4)
    mask = liar.select(model, tiny_batches(model), keep=0.5, criterion=criterion, widths="balanced", progress=False)
    for kind in ("heads", "neurons"):
        kept = [mask.kept(f"{kind}.{layer}") for layer in range(2)]
        assert abs(kept[0] - kept[1]) <= 1


def test_free_widths_let_sites_compete():
    """A site whose units are all alike but for a few keeps few of them."""
    model = tiny_model("bert")
    layout = layout_of(model)
    budget = Budget.of(layout, params(model), SelectOptions(0.5))
    generator = torch.Generator().manual_seed(0)
    by_site = {site.name: torch.rand(site.units, generator=generator, dtype=torch.float64) for site in layout.sites}
    by_site["neurons.0"][:] = 0.1
    by_site["neurons.0"][:3] = 5.0
    mask = allocate(by_site, layout, budget, "free")
    assert mask.kept("neurons.0") < mask.kept("neurons.1")
    assert bool(mask["neurons.0"][:3].all())
    balanced = allocate(by_site, layout, budget, "balanced")
    assert abs(balanced.kept("neurons.0") - balanced.kept("neurons.1")) <= 1


@pytest.mark.parametrize("widths", ["free", "balanced"])
def test_equal_scores_still_meet_the_budget(widths):
    model = tiny_model("bert")
    layout = layout_of(model)
    equal = {site.name: torch.ones(site.units, dtype=torch.float64) for site in layout.sites}
    mask = allocate(equal, layout, Budget.of(layout, params(model), SelectOptions(0.5)), widths)
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
    agree = sum(int((masks[0][name] == masks[1][name]).sum()) for name in masks[0].masks)
    assert agree > 0.9 * sum(len(units) for units in masks[0].masks.values())


@pytest.mark.parametrize("keep", [0, -0.1, 1.0001, float("nan"), float("inf")])
def test_shares_outside(keep):
    with pytest.raises(OptionError, match="expected the share that stays, above 0 and at most 1"):
        liar.select(tiny_model(), keep=keep, criterion="magnitude")


def test_a_slim_model_can_be_selected_from():
    model = tiny_model("llama")
    batches = tiny_batches(model)
    liar.prune(model, batches, keep=0.7, progress=False)
    layout = layout_of(model)
    mask = liar.select(model, batches, keep=0.8, progress=False)
    assert 0.79 < mask.parameters(layout) / layout.parameters <= 0.8


# Criteria of one's own


def test_a_registered_criterion_is_used(criteria):
    """By `select`, `collect` and `prune`; its statistics are collected, and high scores stay."""
    model = tiny_model("bert")
    batches = tiny_batches(model, batches=1)
    with pytest.raises(OptionError, match="criterion='lively' is not known"):
        liar.select(model, batches, keep=0.5, criterion="lively", progress=False)

    def lively(units):
        return units.per_channel(units.statistics["variance"]).sum(1)

    register_criterion("lively", Criterion(lively, needs="channels"), "variance of the unit's activations")
    assert options.CRITERIA["lively"] == "variance of the unit's activations"
    statistics = liar.collect(model, batches, criteria=["lively"], progress=False)
    mask = liar.select(model, statistics, keep=0.5, criterion="lively")
    assert mask == liar.select(model, batches, keep=0.5, criterion="lively", progress=False)
    variance = statistics.sites["neurons.0"]["variance"]
    assert variance[mask["neurons.0"]].min() > variance[~mask["neurons.0"]].max()
    report = liar.prune(model, batches, keep=0.5, criterion="lively", progress=False)
    assert [site.kept for site in report.sites] == [mask.kept(site.site) for site in report.sites]


@pytest.mark.parametrize("comparable", [True, False])
def test_comparable_scores_compete_as_they_are(criteria, comparable):
    """Neurons score between 2 and 3, heads between 0 and 1: only where that means something do all neurons stay."""
    model = tiny_model("bert")
    layout = layout_of(model)

    def own(units):
        count = len(units.consumer)
        return torch.linspace(0, 1, count, dtype=torch.float64) + 2 * (count > 4)

    register_criterion("own", Criterion(own, None, comparable), "for this test")
    one_head = {site.name: 1 if site.kind == "heads" else site.units for site in layout.sites}
    mask = liar.select(model, keep=layout.kept_parameters(one_head) / layout.parameters, criterion="own")
    assert ({name: mask.kept(name) for name in mask.masks} == one_head) is comparable


def test_random_scores_of_layers_are_not_the_same():
    model = tiny_model("bert", num_hidden_layers=4)
    mask = liar.select(model, keep=0.5, criterion="random", widths="balanced", seed=1)
    rows = [tuple(mask[f"neurons.{layer}"].tolist()) for layer in range(4)]
    assert len(set(rows)) == 4
