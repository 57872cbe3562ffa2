"""Whole sub-layers: what is left of them is the consumer's bias, and everything else goes on as if they were there."""

import copy
import io
import json
import pickle
from dataclasses import replace

import pytest
import torch
from cases import MODELS
from hypothesis import given, settings
from hypothesis import strategies as st

import liar
from liar import Mask, slim
from liar.criteria import Budget
from liar.errors import BudgetError, CheckpointError, MaskError, OptionError, Verdict
from liar.families import discover
from liar.families.bert import BERT
from liar.run import Run
from liar.testing import check_family, tiny_batches, tiny_model

NAMES = ["bert", "bert-classifier", "llama", "llama-8q-2kv", "llama-biases", "llama-wide-heads"]


def without(model, *names):
    """A mask that drops the named sites."""
    return Mask.of({name: [] for name in names}, discover(model), drop=True)


def said(model, batch):
    with torch.no_grad():
        return model(**batch)[0]


def zeroed(model, *names):
    """The dense model in which the consumers of the named sites read nothing."""
    model = copy.deepcopy(model)
    for name in names:
        model.get_submodule(discover(model)[name].module).weight.data.zero_()
    return model


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "names", [["heads.0"], ["neurons.1"], ["heads.0", "neurons.0"], ["heads.0", "neurons.0", "heads.1", "neurons.1"]]
)
def test_removed_is_zeroed(name, names):
    model = tiny_model(**MODELS[name])
    cut = copy.deepcopy(model)
    slim.remove(cut, without(model, *names))
    for batch in tiny_batches(model, batches=2, padding=None):
        torch.testing.assert_close(said(cut, batch), said(zeroed(model, *names), batch))
    found, dense = discover(cut), discover(model)
    assert found.dropped == tuple(site.name for site in dense.sites if site.name in names)
    assert found.parameters == without(model, *names).parameters(dense)
    assert found.uncovered == dense.uncovered


def test_what_is_left_stays_what_it_was():
    model = tiny_model("llama", head="causal-lm")
    attention = model.model.layers[0].self_attn
    seen = []
    attention.register_forward_hook(lambda *_: seen.append(1))
    liar.reconstruct(model, without(model, "heads.0"), tiny_batches(model), progress=False)
    assert model.model.layers[0].self_attn is attention
    assert isinstance(attention, type(tiny_model("llama").layers[0].self_attn))
    seen.clear()
    said(model, tiny_batches(model)[0])
    assert seen == [1]
    assert "no heads" in repr(model)


@pytest.mark.parametrize("options", [{}, {"ridge": 0}, {"target": "same_input"}, {"solver": "eigh"}, {"solver": "lstsq"}])
def test_the_bias_takes_the_mean(options):
    """Of a consumer that reads nothing, least squares gives the mean of the target: here what the dense layer gave."""
    model = tiny_model("bert")
    batches = tiny_batches(model)
    consumer = model.get_submodule(discover(model)["heads.0"].module)
    seen = []
    handle = consumer.register_forward_hook(lambda _module, _inputs, output: seen.append(output.detach()))
    for batch in batches:
        said(model, batch)
    handle.remove()
    rows = torch.cat([output[batch["attention_mask"].bool()] for output, batch in zip(seen, batches, strict=True)])
    report = liar.reconstruct(model, without(model, "heads.0"), batches, progress=False, **options)
    torch.testing.assert_close(consumer.bias.data, rows.mean(0), rtol=1e-4, atol=1e-5)
    assert consumer.weight.shape == (32, 0)
    assert report.dropped == ("heads.0",)
    assert report.verdicts["heads.0"] is Verdict.DROPPED
    assert "sub-layers that are gone: heads.0" in str(report)
    assert liar.Report.from_json(report.to_json()).dropped == ("heads.0",)


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_the_rest_repairs_what_is_gone(model_type):
    """On tokens that were not seen, the repaired model is nearer to the dense one than the cut one."""
    model = tiny_model(model_type)
    *batches, new = tiny_batches(model, batches=9)
    mask = without(model, "heads.0", "neurons.0")
    cut, repaired = copy.deepcopy(model), copy.deepcopy(model)
    slim.remove(cut, mask)
    liar.reconstruct(repaired, mask, batches, progress=False)
    kept = new["attention_mask"].bool()
    dense = said(model, new)[kept]
    assert (said(repaired, new)[kept] - dense).square().mean() < (said(cut, new)[kept] - dense).square().mean()


def test_without_a_bias_nothing_is_left():
    model = tiny_model("llama")
    report = liar.reconstruct(model, without(model, "neurons.1"), tiny_batches(model), progress=False)
    site = report.sites[-1]
    assert (site.verdict, site.kept, site.before, site.after) == (Verdict.DROPPED, 0, site.after, site.before)
    created = tiny_model("llama")
    liar.reconstruct(created, without(created, "neurons.1"), tiny_batches(created), bias="create", progress=False)
    assert created.layers[1].mlp.down_proj.bias.abs().max() > 0


@pytest.mark.parametrize("names", [["heads.0"], ["neurons.0"], ["heads.0", "heads.1"], ["heads.1", "neurons.1"]])
@pytest.mark.parametrize("head", ["bert", "llama"])
def test_saved_and_loaded(head, names, tmp_path):
    model = tiny_model(head, head={"bert": "sequence-classification", "llama": "causal-lm"}[head])
    batches, mask = tiny_batches(model), without(model, *names)
    report = liar.reconstruct(model, mask, batches, progress=False)
    liar.save(model, tmp_path / "slim", mask=mask, report=report)
    again = liar.load(tmp_path / "slim")
    assert type(again) is type(model)
    assert torch.equal(said(again, batches[0]), said(model, batches[0]))
    assert discover(again) == discover(model)
    sites = json.loads((tmp_path / "slim" / "liar.json").read_text())["sites"]
    assert {name for name, site in sites.items() if site["units"] == 0} == set(names)
    config = json.loads((tmp_path / "slim" / "config.json").read_text())
    key = {"heads": "num_attention_heads", "neurons": "intermediate_size"}[names[0].split(".")[0]]
    assert config["per_layer_config"][names[0].split(".")[1]][key] == 0
    # Once more, from what was loaded.
    liar.save(again, tmp_path / "slim")
    assert torch.equal(said(liar.load(tmp_path / "slim"), batches[0]), said(model, batches[0]))


def test_biases_that_were_created_come_back(tmp_path):
    model = tiny_model("llama", head="causal-lm")
    liar.reconstruct(model, without(model, "heads.0", "neurons.1"), tiny_batches(model), bias="create", progress=False)
    liar.save(model, tmp_path / "slim")
    batch = tiny_batches(model)[0]
    assert torch.equal(said(liar.load(tmp_path / "slim"), batch), said(model, batch))


def test_copies_and_pickles():
    for name in ("bert", "llama"):
        model = tiny_model(name)
        slim.remove(model, without(model, "heads.0"))
        batch = tiny_batches(model)[0]
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
            assert torch.equal(said(other, batch), said(model, batch))
            assert discover(other).dropped == ("heads.0",)


@pytest.mark.parametrize("names", [["heads.0"], ["heads.1"], ["heads.0", "heads.1"], ["neurons.0"]])
@pytest.mark.parametrize("cache", [None, "static"])
def test_text_goes_on_with_and_without_a_cache(names, cache):
    """The length of the text so far is asked of one layer's cache."""
    model = tiny_model("llama", head="causal-lm")
    slim.remove(model, without(model, *names))
    ids = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 1, 2, 8]])
    how = {"attention_mask": (ids > 0).long(), "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    kept = {} if cache is None else {"cache_implementation": cache}
    fast, slow = model.generate(ids, **how, **kept), model.generate(ids, use_cache=False, **how)
    assert fast.shape == (2, 17)
    assert torch.equal(fast, slow)


def test_training_goes_on():
    model = tiny_model("bert", head="sequence-classification")
    slim.remove(model, without(model, "heads.0", "neurons.1"))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    batch = {**tiny_batches(model)[0], "labels": torch.zeros(8, dtype=torch.int64)}
    losses = []
    for _ in range(5):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", NAMES)
def test_what_was_dropped_is_no_site_any_more(name):
    """A second cut leaves it alone."""
    model = tiny_model(**MODELS[name])
    batches = tiny_batches(model)
    slim.remove(model, without(model, "heads.0", "neurons.1"))
    before = discover(model).parameters
    report = liar.prune(model, batches, keep=0.6, progress=False)
    assert [site.site for site in report.sites] == ["neurons.0", "heads.1"]
    assert discover(model).dropped == ("heads.0", "neurons.1")
    assert discover(model).parameters <= 0.6 * before
    with pytest.raises(MaskError, match=r"mask\['heads\.0'\]: no such site .*; dropped earlier: heads\.0, neurons\.1$"):
        liar.reconstruct(model, {"heads.0": [0]}, batches, progress=False)
    with pytest.raises(OptionError, match=r"no such site or layer: 'heads\.0'.*; dropped earlier: heads\.0, neurons\.1$"):
        liar.select(model, keep=0.9, criterion="magnitude", protect=["heads.0"], progress=False)
    with pytest.raises(BudgetError, match=r"uniform: no stock class leaves a sub-layer out, .* lost heads\.0, neurons\.1$"):
        liar.select(model, keep=0.9, criterion="magnitude", uniform=True, progress=False)


def test_a_second_cut_is_saved_with_its_mask(tmp_path):
    model = tiny_model("bert")
    batches = tiny_batches(model)
    slim.remove(model, without(model, "heads.0"))
    mask = liar.select(model, batches, keep=0.7, progress=False)
    liar.reconstruct(model, mask, batches, progress=False)
    liar.save(model, tmp_path / "slim", mask=mask)
    assert discover(liar.load(tmp_path / "slim")) == discover(model)
    wrong = Mask({**mask.keep, "heads.1": ~mask["heads.1"] | True})
    with pytest.raises(CheckpointError, match="the mask is not the one this model was cut by"):
        liar.save(model, tmp_path / "slim", mask=wrong)


def test_masks_by_layer_have_a_row_for_what_is_gone():
    model = tiny_model("bert", num_hidden_layers=3)
    slim.remove(model, without(model, "heads.0"))
    rows = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]])
    mask = Mask.of({"heads": rows}, discover(model))
    assert "heads.0" not in mask.keep
    assert (mask.kept("heads.1"), mask.kept("heads.2")) == (1, 2)
    with pytest.raises(MaskError, match="expected one row for each of 3 layers, got 2"):
        Mask.of({"heads": rows[1:]}, discover(model))


def test_a_model_without_sites_is_refused():
    model = tiny_model("bert")
    names = [site.name for site in discover(model).sites]
    slim.remove(model, without(model, *names))
    assert discover(model).dropped == tuple(names)
    assert said(model, tiny_batches(model)[0]).isfinite().all()
    with pytest.raises(liar.LiarError, match="every sub-layer was dropped, nothing is left to work on"):
        liar.select(model, keep=0.5, criterion="magnitude", progress=False)


def test_masks_that_drop():
    layout = discover(tiny_model("bert"))
    for dropping in (
        Mask.of({"heads": torch.tensor([[0.0, 0, 0, 0], [1, 0, 1, 0]])}, layout, drop=True),
        Mask.from_removed({"heads.0": [0, 1, 2, 3], "heads.1": [1, 3]}, layout, drop=True),
    ):
        assert dropping.dropped == ("heads.0",)
        assert Mask.from_json(dropping.to_json()) == dropping == Mask.of(dropping, layout)
        whole = Mask.of({}, layout)
        assert dropping & whole == dropping == whole & dropping
        assert dropping | whole == whole
        assert dropping.overlap(whole)["heads.0"] == 0


def test_a_family_without_a_mixer_keeps_its_heads():
    liar.register(without_mixer())
    try:
        model = tiny_model("bert")
        model.config.model_type = "bert-without-mixer"
        with pytest.raises(MaskError, match=r"heads\.0 .*it cannot be dropped, since the family's table has no mixer for it"):
            without(model, "heads.0")
        assert without(model, "neurons.0").dropped == ("neurons.0",)
        with pytest.raises(BudgetError, match="with 1 heads, 0 neurons"):
            liar.select(model, tiny_batches(model), keep=0.03, drop=True, progress=False)
        assert [min(levels) for levels in liar.latency(model, length=8, progress=False).sites.values()] == [1, 0, 1, 0]
        check_family(model)
    finally:
        liar.families._FAMILIES.pop("bert-without-mixer")


def without_mixer():
    patterns = tuple(replace(pattern, mixer=None) for pattern in BERT.patterns)
    return replace(BERT, model_type="bert-without-mixer", patterns=patterns)


# selection


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("budget", ["params", "flops"])
def test_no_budget_is_exceeded(name, budget):
    model = tiny_model(name)
    costs = {"params": liar.costs.params, "flops": liar.flops}[budget](model)
    statistics = liar.collect(model, tiny_batches(model), criteria=["reconstruction", "taylor"], progress=False)
    seen = set()

    @settings(max_examples=20)
    @given(keep=st.floats(0.12, 1.0), criterion=st.sampled_from(["reconstruction", "taylor"]))
    def check(keep, criterion):
        mask = liar.select(model, statistics, keep=keep, criterion=criterion, budget=costs, drop=True, progress=False)
        assert costs.of({site: mask.kept(site) for site in mask.keep}) <= keep * costs.dense
        seen.add(mask.dropped != ())

    check()
    assert seen == {True, False}


@pytest.mark.parametrize("round_to", [1, 16])
def test_what_is_worth_nothing_is_dropped(round_to):
    """A sub-layer whose output is thrown away goes before anything else does; without the option it keeps one unit."""
    model = tiny_model("bert")
    layout = discover(model)
    model.get_submodule(layout["neurons.0"].module).weight.data.zero_()
    batches = tiny_batches(model)
    dense = said(model, batches[0])
    statistics = liar.collect(model, batches, progress=False)
    kept = {
        drop: liar.select(model, statistics, keep=0.7, drop=drop, round_to=round_to, progress=False) for drop in (False, True)
    }
    assert kept[True].dropped == ("neurons.0",)
    assert kept[False].dropped == ()
    assert kept[False].kept("neurons.0") == round_to
    slim.remove(model, Mask({name: row if name == "neurons.0" else row | True for name, row in kept[True].keep.items()}))
    torch.testing.assert_close(said(model, batches[0]), dense)


def test_a_smaller_budget_can_be_met():
    model = tiny_model("bert")
    batches = tiny_batches(model)
    with pytest.raises(BudgetError, match="cannot be met"):
        liar.select(model, batches, keep=0.03, progress=False)
    mask = liar.select(model, batches, keep=0.03, drop=True, progress=False)
    layout = discover(model)
    assert len(mask.dropped) > 0
    assert mask.parameters(layout) <= 0.03 * layout.parameters


def test_protected_sites_are_not_dropped():
    model = tiny_model("bert")
    layout = discover(model)
    model.get_submodule(layout["neurons.0"].module).weight.data.zero_()
    batches = tiny_batches(model)
    assert liar.select(model, batches, keep=0.6, drop=True, progress=False).dropped == ("neurons.0",)
    assert liar.select(model, batches, keep=0.6, drop=True, protect=["neurons.0"], progress=False).whole("neurons.0")


def test_costs_that_do_not_know_the_empty_site(caplog):
    """Times measured before there was such an option: what they do not know is not done."""
    model = tiny_model("bert")
    costs = liar.costs.params(model)
    sites = {name: {count: cost for count, cost in levels.items() if count} for name, levels in costs.sites.items()}
    old = liar.Costs(costs.name, costs.fixed, sites)
    assert liar.select(model, tiny_batches(model), keep=0.5, budget=old, drop=True, progress=False).dropped == ()
    assert "drop: the parameters of no site without units are known, so none is dropped" in caplog.text
    assert set(Budget.of(discover(model), old, 0.5, drop=True).least.values()) == {1}
    assert set(Budget.of(discover(model), costs, 0.5, drop=True).least.values()) == {0}


def test_measured_times_know_the_empty_site():
    model = tiny_model("bert")
    costs = liar.latency(model, length=16, progress=False)
    assert all(min(levels) == 0 for levels in costs.sites.values())
    # As if time were in proportion to the units: what the machine says would be another number every time.
    sites = {name: {count: count / max(levels) - 1 for count in levels} for name, levels in costs.sites.items()}
    even = liar.Costs("seconds", 4.0, sites)
    mask = liar.select(model, tiny_batches(model), keep=0.1, budget=even, drop=True, progress=False)
    assert mask.dropped
    assert even.of({name: mask.kept(name) for name in mask.keep}) <= 0.1 * even.dense


def never(*_):
    raise AssertionError("work was done before the options were checked")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"uniform": True}, r"drop and uniform: .*choose one"),
        ({"scope": "layer"}, r"drop with criterion='reconstruction', scope='layer': expected scope='global'"),
        (
            {"criterion": "wanda"},
            r"drop with criterion='wanda', scope='global': expected .*one of reconstruction, taylor, fisher, snip;",
        ),
    ],
)
def test_options_that_cannot_say_what_to_drop(options, says, monkeypatch, tmp_path):
    """Scores within a site cannot; said before anything is timed or loaded."""
    monkeypatch.setitem(liar.api.BUDGETS, "latency", never)
    with pytest.raises(OptionError, match=says):
        liar.select(tiny_model("bert"), keep=0.5, budget="latency", drop=True, progress=False, **options)
    run = Run("prune", str(tmp_path / "no-model"), str(tmp_path / "out"), "no-texts.txt", keep=0.5, drop=True, **options)
    with pytest.raises(OptionError, match=says):
        run.carry_out()
