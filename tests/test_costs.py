"""Budgets: what is counted is what the model does, and no budget is ever exceeded."""

import copy
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from cases import MODELS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import liar
from liar import slim, timing
from liar.batches import Calibration
from liar.costs import Costs, params
from liar.criteria import Budget
from liar.criteria.levels import share
from liar.errors import BudgetError, OptionError
from liar.families import discover
from liar.testing import tiny_batches, tiny_model
from liar.timing import widths

NAMES = ["bert", "bert-classifier", "llama", "llama-8q-2kv", "llama-biases", "llama-wide-heads"]


def counted(model, length):
    """Floating-point operations of the blocks, as torch counts them while one sequence runs."""
    blocks = [model.get_submodule(name) for name in discover(model).blocks]
    seen = []

    def count(block, args, kwargs):
        with FlopCounterMode(display=False) as counter:
            type(block).forward(block, *args, **kwargs)
        seen.append(counter.get_total_flops())

    handles = [block.register_forward_pre_hook(count, with_kwargs=True) for block in blocks]
    with torch.no_grad():
        model(**Calibration.of([torch.zeros(1, length, dtype=torch.int64)], model).batches[0])
    for handle in handles:
        handle.remove()
    return sum(seen)


def timed(model):
    """Seconds as `liar.latency` would give them, but the same on every machine: each site at its `widths`."""
    sites = {site.name: {number: number / site.units - 1 for number in widths(site.units)} for site in discover(model).sites}
    return Costs("seconds", 1.5 * len(sites), sites)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [5, 48])
def test_flops_are_those_that_torch_counts(name, length):
    model = tiny_model(**MODELS[name], attention="eager")
    costs = liar.flops(model, length=length)
    # LLaMA's rotary table is a product too; it belongs to the model and not to its blocks.
    assert costs.dense == counted(model, length)
    mask = liar.select(model, keep=0.6, criterion="random")
    slim.remove(model, mask)
    assert costs.of({site: mask.kept(site) for site in mask.keep}) == counted(model, length)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_slim_model(name):
    model = tiny_model(**MODELS[name])
    costs, layout = params(model), discover(model)
    assert costs.dense == layout.parameters
    mask = liar.select(model, keep=0.6, criterion="random")
    assert costs.of({site: mask.kept(site) for site in mask.keep}) == mask.parameters(layout)


@pytest.mark.parametrize("name", ["bert", "llama-8q-2kv"])
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("keep", [0.5, 0.77, 1.0])
@pytest.mark.parametrize("length", [16, 2048])
def test_flops_are_met_and_never_exceeded(name, scope, keep, length):
    model = tiny_model(**MODELS[name])
    costs = liar.flops(model, length=length)
    mask = liar.select(model, tiny_batches(model, batches=1), keep=keep, scope=scope, budget=costs, progress=False)
    # Where heads are nearly all of the cost, one of the few there are is more than 1 %.
    step = max(costs.prices.values()) / costs.dense if length == 2048 else 0.01
    assert keep - step <= costs.of({site: mask.kept(site) for site in mask.keep}) / costs.dense <= keep
    assert mask.asked is None


def test_long_sequences_cost_heads():
    """The longer the sequences, the more of the work is in heads, and the less is to be had from neurons."""
    model = tiny_model("bert")
    batches = tiny_batches(model)
    neurons = []
    for length in (8, 2048):
        costs = liar.flops(model, length=length)
        mask = liar.select(model, batches, keep=0.9, budget=costs, protect=["heads.0"], progress=False)
        neurons.append(sum(mask.kept(f"neurons.{layer}") for layer in range(2)))
    assert neurons[0] < neurons[1]


@pytest.mark.parametrize("name", ["bert", "llama", "llama-8q-2kv"])
@pytest.mark.parametrize("criterion", ["reconstruction", "fluctuation"])
@pytest.mark.parametrize("round_to", [8, 12])
def test_widths_are_rounded(name, criterion, round_to):
    model = tiny_model(**MODELS[name])
    mask = liar.select(model, tiny_batches(model, batches=1), keep=0.7, criterion=criterion, round_to=round_to, progress=False)
    layout = discover(model)
    for site in layout.sites:
        kept = mask.kept(site.name)
        assert kept == site.units or kept * site.consumer.width % round_to == 0
    assert 0.5 < mask.parameters(layout) / layout.parameters <= 0.7


def test_rounded_widths_keep_the_best_units():
    model = tiny_model("bert")
    statistics = liar.collect(model, tiny_batches(model), progress=False)
    mask = liar.select(model, statistics, keep=0.5, round_to=16)
    for name, keep in mask.keep.items():
        order, sets = statistics.sites[name]["order"], statistics.sites[name]["kept"]
        last = torch.zeros_like(keep).index_fill_(0, order[len(order) - mask.kept(name) :], True)
        assert torch.equal(keep, sets[mask.kept(name)] if len(sets) else last)


@pytest.mark.parametrize("keep", [0.5, 0.7])
def test_uniform_widths_load_in_stock_classes(keep, tmp_path):
    model = tiny_model("llama", head="causal-lm", num_key_value_heads=4)
    batches = tiny_batches(model)
    liar.prune(model, batches, keep=keep, uniform=True, progress=False)
    layout = discover(model)
    for kind in ("heads", "neurons"):
        assert len({site.units for site in layout.of_kind(kind)}) == 1
    liar.save(model, tmp_path)
    with torch.no_grad():
        want = model(**batches[0]).logits
    code = (
        "import sys, json, torch; sys.modules['liar'] = None; from transformers import AutoModelForCausalLM; "
        f"m = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}); "
        f"b = {{k: torch.tensor(v) for k, v in json.loads(sys.stdin.read()).items()}}; print(float(m(**b).logits.sum()))"
    )
    batch = json.dumps({key: value.tolist() for key, value in batches[0].items()})
    done = subprocess.run([sys.executable, "-c", code], input=batch, capture_output=True, text=True, check=True)
    assert float(done.stdout.splitlines()[-1]) == pytest.approx(float(want.sum()), rel=1e-4)


def test_uniform_keeps_the_heads_that_a_class_cannot_do_without():
    """Fewer heads in BERT's configuration are wider heads: no stock class has a slim model's shapes."""
    model = tiny_model("bert")
    assert slim.stock_counts(model) == {"heads": [4], "neurons": list(range(1, 65))}
    mask = liar.select(model, tiny_batches(model), keep=0.6, uniform=True, progress=False)
    assert mask.whole("heads.0")
    assert mask.whole("heads.1")
    assert mask.kept("neurons.0") == mask.kept("neurons.1") < 64
    slim.remove(model, mask)
    assert slim.uniform_sizes(model) is not None
    with pytest.raises(BudgetError, match=r"keep=0.3 cannot be met: .* 0\.\d+ of the parameters, with 4 heads, 1 neurons in"):
        liar.select(tiny_model("bert"), tiny_batches(model), keep=0.3, uniform=True, progress=False)


def test_stock_counts_of_grouped_heads():
    assert slim.stock_counts(tiny_model(**MODELS["llama-8q-2kv"])) == {"heads": [1, 2], "neurons": list(range(1, 65))}


@pytest.mark.parametrize("options", [{}, {"round_to": 8}, {"criterion": "fluctuation", "scope": "layer"}])
def test_protected_sites_stay_whole(options):
    model = tiny_model("bert")
    mask = liar.select(model, tiny_batches(model), keep=0.8, protect=["heads.0", 1], progress=False, **options)
    assert [mask.whole(name) for name in ("heads.0", "neurons.0", "heads.1", "neurons.1")] == [True, False, True, True]
    assert 0.75 < mask.parameters(discover(model)) / discover(model).parameters <= 0.8


def test_what_cannot_be_asked_for():
    model = tiny_model("bert")
    batches = tiny_batches(model)
    with pytest.raises(OptionError, match=r"no such site or layer: 'heads.7'; expected names such as 'heads.0' or .* 0 to 1"):
        liar.select(model, batches, keep=0.5, protect=["heads.7"], progress=False)
    with pytest.raises(OptionError, match="expected a list of names"):
        liar.select(model, batches, keep=0.5, protect="heads.0", progress=False)
    with pytest.raises(OptionError, match="round_to=0: expected a number of channels, at least 1"):
        liar.select(model, batches, keep=0.5, round_to=0, progress=False)
    with pytest.raises(OptionError, match="budget='time' is not known; expected one of 'params', 'flops', 'latency'"):
        liar.select(model, batches, keep=0.5, budget="time")
    with pytest.raises(BudgetError, match=r"is 0\.5\d+ of the parameters, with 4 heads, 64 neurons, 1 heads, 1 neurons in a"):
        liar.select(model, batches, keep=0.3, protect=[0], progress=False)
    liar.slim.remove(model, liar.Mask({**whole(model), "neurons.1": torch.arange(64) < 40}))
    with pytest.raises(BudgetError, match=r"uniform: heads of different layers .*heads\.0, heads\.1.*leave uniform out"):
        liar.select(model, batches, keep=0.5, uniform=True, progress=False)


def whole(model):
    return {site.name: torch.ones(site.units, dtype=torch.bool) for site in discover(model).sites}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.3, 1.0))
def test_shared_as_the_best_of_all_ways(seed, keep):
    """The integer program against all ways to choose, with costs of any form and losses of any size."""
    random = np.random.default_rng(seed)
    layout = discover(tiny_model("bert", intermediate_size=6))
    sites = {site.name: dict.fromkeys([2, 3, site.units]) for site in layout.sites}
    costs = Costs("things", 1.0, {name: {n: random.uniform() for n in counts} for name, counts in sites.items()})
    losses = {site.name: torch.from_numpy(random.uniform(size=site.units)) for site in layout.sites}
    ways = [dict(zip(sites, counts, strict=True)) for counts in itertools.product(*sites.values())]
    possible = [way for way in ways if costs.of(way) <= keep * costs.dense]
    if not possible:
        with pytest.raises(BudgetError, match="cannot be met"):
            Budget.of(layout, costs, keep)
        return

    def lost(way):
        return sum(float(losses[name].sort().values[: len(losses[name]) - count].sum()) for name, count in way.items())

    kept = share(losses, Budget.of(layout, costs, keep))
    assert costs.of(kept) <= keep * costs.dense * (1 + 1e-6)
    assert lost(kept) <= min(map(lost, possible)) + 1e-3


def test_latency_is_a_budget(tmp_path):
    model = tiny_model("llama", hidden_size=64, intermediate_size=512)
    before = copy.deepcopy(model.state_dict())
    file = tmp_path / "latency.json"
    costs = liar.latency(model, batch_size=2, length=16, cache=file, progress=False)
    for site in discover(model).sites:
        levels = costs.sites[site.name]
        assert sorted(levels) == list(levels) == widths(site.units)
        values = list(levels.values())
        assert values == sorted(values)
        assert values[-1] == 0
    assert costs.dense == costs.fixed > 0
    assert costs.prices is None
    again = liar.latency(model, batch_size=2, length=16, cache=file, progress=False)
    assert again == costs == Costs.load(file)
    assert liar.latency(model, batch_size=1, length=16, cache=file, progress=False).about["batch_size"] == 1
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def times_of(layout, price, *, model, block):
    """Seconds as they would be measured if a unit of each kind had one price, `block` times as much in single blocks."""

    def of(keep):
        return sum(price[site.kind] * keep(site) for site in layout.sites)

    seconds = {timing.WHOLE: model + of(lambda site: site.units), timing.HALF: model + of(timing._middle)}
    for site in layout.sites:
        others = sum(price[other.kind] * other.units for other in layout.of_block(site.block) if other is not site)
        for count in timing._counts(site):
            seconds[timing._layer(layout, site, count)] = block * (others + price[site.kind] * count)
    return seconds


@pytest.mark.parametrize("block", [0.7, 1.0, 1.4])
def test_what_single_blocks_save_is_scaled_to_the_whole_model(block):
    layout = discover(tiny_model("llama", hidden_size=64, intermediate_size=512))
    price = {"heads": 0.25, "neurons": 0.002}
    costs = timing._costs(layout, times_of(layout, price, model=3.0, block=block), {})
    for way in itertools.islice(itertools.product(*(costs.sites[site.name] for site in layout.sites)), 0, None, 7):
        kept = dict(zip(costs.sites, way, strict=True))
        want = 3.0 + sum(price[site.kind] * kept[site.name] for site in layout.sites)
        assert costs.of(kept) == pytest.approx(want, rel=1e-9)


def test_a_model_that_half_of_its_units_make_no_faster():
    """Then no budget below all of the time can be met; and where blocks save nothing, nothing is made up."""
    layout = discover(tiny_model("bert"))
    seconds = times_of(layout, {"heads": 0.25, "neurons": 0.002}, model=3.0, block=1.0)
    slower = timing._costs(layout, seconds | {timing.HALF: seconds[timing.WHOLE] + 1}, {})
    assert {cost for levels in slower.sites.values() for cost in levels.values()} == {0.0}
    with pytest.raises(BudgetError, match="cannot be met"):
        Budget.of(layout, slower, 0.9)
    flat = timing._costs(layout, dict.fromkeys(seconds, 1.0) | {timing.HALF: 0.1}, {})
    assert {cost for levels in flat.sites.values() for cost in levels.values()} == {0.0}


def test_the_half_model_that_is_timed():
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    layout, half = discover(model), timing._half(model, discover(model))
    assert [site.units for site in discover(half).sites] == [timing._middle(site) for site in layout.sites]
    first, second = (half.get_submodule(name) for name in layout.blocks[:2])
    assert all(one is other for one, other in zip(first.parameters(), second.parameters(), strict=True))
    ids = torch.randint(model.config.vocab_size, (2, 5))
    assert torch.isfinite(half(ids)[0]).all()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_times_with_gaps_have_no_price_even_if_they_are_all_alike():
    """As on a busy machine, where a tiny layer takes as long at every width: only the widths that were timed may stay."""
    flat = Costs("seconds", 1.0, {"neurons.0": {0: 0.0, 8: 0.0, 16: 0.0}})
    assert flat.prices is None
    assert Costs("seconds", 1.0, {"neurons.0": {1: 0.5, 2: 1.0}}).prices == {"neurons.0": 0.5}
    assert Costs("seconds", 1.0, {"neurons.0": {0: 0.1, 1: 0.5, 2: 1.0}}).prices is None


def test_a_budget_in_time():
    model = tiny_model("llama", hidden_size=64, intermediate_size=512)
    costs, batches = timed(model), tiny_batches(model)
    mask = liar.select(model, batches, keep=0.6, budget=costs, progress=False)
    assert all(mask.kept(name) in costs.sites[name] for name in mask.keep)
    assert 0.5 * costs.dense < costs.of({name: mask.kept(name) for name in mask.keep}) <= 0.6 * costs.dense
    liar.reconstruct(model, mask, batches, progress=False)
    with pytest.raises(BudgetError, match=r"another model: \w+\.\d has \d+ units in this one and \d+ there"):
        liar.select(model, batches, keep=0.6, budget=costs, progress=False)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"length": 33}, "length=33: BertModel takes at most 32 tokens in a sequence; give a smaller length"),
        ({"length": 0}, "batch_size=1, length=0: expected at least 1 sequence of at least 1 token"),
        ({"batch_size": -1}, "batch_size=-1, length=128: expected at least 1 sequence"),
    ],
)
def test_a_batch_that_cannot_be_timed(batch, message):
    with pytest.raises(OptionError, match=message):
        liar.latency(tiny_model("bert", max_position_embeddings=32), **batch)


@pytest.mark.parametrize("keep", [0, -0.5, 1.5, float("nan"), None])
def test_an_impossible_share_is_refused_before_anything_is_timed(keep, capsys):
    with pytest.raises(OptionError, match=f"keep={keep}: expected the share that stays, above 0 and at most 1"):
        liar.select(tiny_model("bert"), keep=keep, budget="latency")
    assert capsys.readouterr().err == ""


def test_timing_without_a_bar(capsys):
    model = tiny_model("bert", max_position_embeddings=128, num_hidden_layers=1, intermediate_size=4)
    # A tiny model takes about as long whatever it keeps, so only all of it is sure to be within the budget.
    liar.select(model, keep=1, criterion="magnitude", budget="latency")
    assert "latency: " in capsys.readouterr().err
    liar.select(model, keep=1, criterion="magnitude", budget="latency", progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("units", "want"), [(1, [0, 1]), (4, [0, 1, 2, 3, 4]), (172, None), (1536, [96 * i for i in range(17)]), (300, None)]
)
def test_widths_that_are_timed(units, want):
    found = widths(units)
    assert found[-1] == units
    assert found == sorted(set(found))
    assert found[0] == 0
    assert len(found) <= 18
    if want is not None:
        assert found == want
    if units >= 256:
        assert all(width % 8 == 0 for width in found[:-1])


def test_a_file_that_is_something_else(tmp_path):
    with pytest.raises(BudgetError, match=r"missing: .*No such file"):
        Costs.load(tmp_path / "missing")
    for name, text in (("text", "no costs"), ("list", "[1]"), ("other", '{"name": 1}')):
        (tmp_path / name).write_text(text)
        with pytest.raises(BudgetError, match=f"{name}: expected costs as Costs.save or `liar latency` writes them"):
            Costs.load(tmp_path / name)
