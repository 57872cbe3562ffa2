"""Budgets: what is counted is what the model does, and no budget is ever exceeded."""

import copy
import itertools
from importlib import import_module
from math import inf, nan

import numpy as np
import pytest
import torch
from cases import MODELS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import liar
from liar.data import Calibration
from liar.errors import BudgetError, OptionError
from liar.models import layer_of, layout_of
from liar.options import SelectOptions
from liar.selection import Budget, Costs, params
from liar.selection.allocate import allocate
from liar.selection.budget.milp import allocate_milp
from liar.surgery import stock_counts, uniform_sizes
from liar.testing import tiny_batches, tiny_model

NAMES = ["bert", "bert-classifier", "llama", "llama-8q-2kv", "llama-biases", "llama-wide-heads", "gpt2-lm"]
# The package exports a function of the same name.
timing = import_module("liar.selection.budget.latency")


def counted(model, length):
    """Floating-point operations of the blocks, as torch counts them while one sequence runs."""
    blocks = [model.get_submodule(name) for name in layout_of(model).blocks]
    operations = []

    def count(block, args, kwargs):
        with FlopCounterMode(display=False) as counter:
            type(block).forward(block, *args, **kwargs)
        operations.append(counter.get_total_flops())

    handles = [block.register_forward_pre_hook(count, with_kwargs=True) for block in blocks]
    with torch.no_grad():
        model(**Calibration.of([torch.zeros(1, length, dtype=torch.int64)], model).batches[0])
    for handle in handles:
        handle.remove()
    return sum(operations)


def timed(model):
    """Seconds as `liar.latency` would give them, but the same on every machine: each site at the widths that are timed."""
    sites = {
        site.name: {number: number / site.units - 1 for number in timing.widths(site.units)} for site in layout_of(model).sites
    }
    return Costs("seconds", 1.5 * len(sites), sites)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [5, 48])
def test_flops_are_those_that_torch_counts(name, length):
    model = tiny_model(**MODELS[name], attention="eager")
    costs = liar.flops(model, length=length)
    # LLaMA's rotary table is a product too; it belongs to the model and not to its blocks.
    assert costs.dense == counted(model, length)
    mask = liar.select(model, keep=0.6, criterion="random")
    liar.remove(model, mask)
    assert costs.of({site: mask.kept(site) for site in mask.masks}) == counted(model, length)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_slim_model(name):
    model = tiny_model(**MODELS[name])
    costs, layout = params(model), layout_of(model)
    assert costs.dense == layout.parameters
    mask = liar.select(model, keep=0.6, criterion="random")
    assert costs.of({site: mask.kept(site) for site in mask.masks}) == mask.parameters(layout)


@pytest.mark.parametrize("name", ["bert", "llama-8q-2kv"])
@pytest.mark.parametrize("widths", ["free", "balanced"])
@pytest.mark.parametrize("length", [16, 2048])
def test_flops_are_met_and_never_exceeded(name, widths, length):
    model = tiny_model(**MODELS[name])
    costs = liar.flops(model, length=length)
    statistics = liar.collect(model, tiny_batches(model, batches=1), progress=False)
    # Where heads are nearly all of the cost, one of the few there are is more than 1 %.
    step = max(costs.unit_costs.values()) / costs.dense if length == 2048 else 0.01
    for keep in (0.5, 0.77, 1.0):
        mask = liar.select(model, statistics, keep=keep, widths=widths, budget=costs, progress=False)
        assert keep - step <= costs.of({site: mask.kept(site) for site in mask.masks}) / costs.dense <= keep
        assert mask.requested is None


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
    layout = layout_of(model)
    for site in layout.sites:
        kept = mask.kept(site.name)
        assert kept == site.units or kept * site.consumer.width % round_to == 0
    assert 0.5 < mask.parameters(layout) / layout.parameters <= 0.7


@pytest.mark.parametrize("round_to", [8, 16])
def test_balanced_widths_in_steps_are_the_same_in_all_layers(round_to):
    """Where scores of one layer are much higher, free widths differ and balanced ones do not."""
    model = tiny_model("bert", num_hidden_layers=3)
    with torch.no_grad():
        for name in ("attention.output.dense", "output.dense"):
            model.encoder.layer[0].get_submodule(name).weight *= 8
    batches = tiny_batches(model)
    widths = {}
    for option in ("free", "balanced"):
        mask = liar.select(model, batches, keep=0.6, widths=option, round_to=round_to, progress=False)
        assert mask.parameters(layout_of(model)) / layout_of(model).parameters <= 0.6
        widths[option] = [mask.kept(f"neurons.{layer}") for layer in range(3)]
    assert max(widths["free"]) - min(widths["free"]) > round_to >= max(widths["balanced"]) - min(widths["balanced"])


def test_rounded_widths_keep_the_best_units():
    model = tiny_model("bert")
    statistics = liar.collect(model, tiny_batches(model), progress=False)
    mask = liar.select(model, statistics, keep=0.5, round_to=16)
    for name, kept in mask.masks.items():
        order = statistics.sites[name]["order"]
        last = torch.zeros_like(kept).index_fill_(0, order[len(order) - mask.kept(name) :], True)
        assert torch.equal(kept, last)


@pytest.mark.parametrize("keep", [0.5, 0.7])
def test_uniform_widths_load_in_stock_classes(keep, tmp_path):
    model = tiny_model("llama", head="causal-lm", num_key_value_heads=4)
    batches = tiny_batches(model)
    liar.prune(model, batches, keep=keep, widths="uniform", progress=False)
    layout = layout_of(model)
    for kind in ("heads", "neurons"):
        assert len({site.units for site in layout.of_kind(kind)}) == 1
    liar.save(model, tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(stock(**batches[0]).logits, model(**batches[0]).logits, rtol=0, atol=0)


def test_uniform_keeps_the_heads_that_a_class_cannot_do_without():
    """Fewer heads in BERT's configuration are wider heads: no stock class has a slim model's shapes."""
    model = tiny_model("bert")
    assert stock_counts(model) == {"heads": [4], "neurons": list(range(1, 65))}
    mask = liar.select(model, tiny_batches(model), keep=0.6, widths="uniform", progress=False)
    assert mask.keeps_all("heads.0")
    assert mask.keeps_all("heads.1")
    assert mask.kept("neurons.0") == mask.kept("neurons.1") < 64
    liar.remove(model, mask)
    assert uniform_sizes(model) is not None
    with pytest.raises(BudgetError, match=r"keep=0.3 cannot be met: .* 0\.\d+ of the parameters, with 4 heads, 1 neurons in"):
        liar.select(tiny_model("bert"), tiny_batches(model), keep=0.3, widths="uniform", progress=False)


def test_stock_counts_of_grouped_heads():
    assert stock_counts(tiny_model(**MODELS["llama-8q-2kv"])) == {"heads": [1, 2], "neurons": list(range(1, 65))}


@pytest.mark.parametrize("options", [{}, {"round_to": 8}, {"criterion": "fluctuation", "widths": "balanced"}])
def test_protected_sites_stay_whole(options):
    model = tiny_model("bert")
    mask = liar.select(model, tiny_batches(model), keep=0.8, protect=["heads.0", 1], progress=False, **options)
    assert [mask.keeps_all(name) for name in ("heads.0", "neurons.0", "heads.1", "neurons.1")] == [True, False, True, True]
    assert 0.75 < mask.parameters(layout_of(model)) / layout_of(model).parameters <= 0.8


def test_what_cannot_be_requested():
    model = tiny_model("bert")
    batches = tiny_batches(model)
    with pytest.raises(OptionError, match=r"no such site or layer: 'heads.7'; expected names such as 'heads.0' or .* 0 to 1"):
        liar.select(model, batches, keep=0.5, protect=["heads.7"], progress=False)
    with pytest.raises(OptionError, match="expected a list of names"):
        liar.select(model, batches, keep=0.5, protect="heads.0", progress=False)
    with pytest.raises(OptionError, match="round_to=0: expected a whole number, at least 1"):
        liar.select(model, batches, keep=0.5, round_to=0, progress=False)
    with pytest.raises(OptionError, match="budget='time' is not known; expected one of 'params', 'flops', 'latency'"):
        liar.select(model, batches, keep=0.5, budget="time")
    with pytest.raises(BudgetError, match=r"is 0\.5\d+ of the parameters, with 4 heads, 64 neurons, 1 heads, 1 neurons in a"):
        liar.select(model, batches, keep=0.3, protect=[0], progress=False)
    liar.remove(model, liar.Mask({**everything(model), "neurons.1": torch.arange(64) < 40}))
    with pytest.raises(
        BudgetError, match=r"widths='uniform': heads of different layers .*heads\.0, heads\.1.*choose other widths"
    ):
        liar.select(model, batches, keep=0.5, widths="uniform", progress=False)


def everything(model):
    return {site.name: torch.ones(site.units, dtype=torch.bool) for site in layout_of(model).sites}


def three_widths(seed):
    """A tiny layout whose sites may keep 2, 3 or all units, with random costs, and all ways to choose."""
    random = np.random.default_rng(seed)
    layout = layout_of(tiny_model("bert", intermediate_size=6))
    sites = {site.name: dict.fromkeys([2, 3, site.units]) for site in layout.sites}
    costs = Costs("things", 1.0, {name: {n: random.uniform() for n in counts} for name, counts in sites.items()})
    ways = [dict(zip(sites, counts, strict=True)) for counts in itertools.product(*sites.values())]
    return random, layout, costs, ways


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.floats(0.3, 1.0))
def test_the_integer_program_finds_the_best_of_all_ways(seed, keep):
    """With costs of any form and losses of any size."""
    random, layout, costs, ways = three_widths(seed)
    losses = {site.name: torch.from_numpy(random.uniform(size=site.units)) for site in layout.sites}
    # At least the cheapest way is possible.
    keep = max(keep, min(map(costs.of, ways)) / costs.dense * (1 + 1e-9))
    possible = [way for way in ways if costs.of(way) <= keep * costs.dense]

    def loss(way):
        return sum(float(losses[name].sort().values[: len(losses[name]) - count].sum()) for name, count in way.items())

    kept = allocate_milp(losses, Budget.of(layout, costs, SelectOptions(keep)))
    assert costs.of(kept) <= keep * costs.dense * (1 + 1e-6)
    assert loss(kept) <= min(map(loss, possible)) + 1e-3


@given(st.integers(0, 10**6))
def test_less_than_the_cheapest_way_cannot_be_met(seed):
    _, layout, costs, ways = three_widths(seed)
    cheapest = min(map(costs.of, ways)) / costs.dense
    with pytest.raises(BudgetError, match=f"cannot be met: the least that is possible is {cheapest:.4f} of the things"):
        Budget.of(layout, costs, SelectOptions(cheapest * (1 - 1e-6)))


@pytest.fixture
def quick(monkeypatch):
    """Times need not be exact."""
    monkeypatch.setattr(timing, "ROUNDS", 3)
    monkeypatch.setattr(timing, "SECONDS", 0.001)


def test_latency_is_a_budget(quick, tmp_path):
    model = tiny_model("llama", hidden_size=64, intermediate_size=512)
    before = copy.deepcopy(model.state_dict())
    file = tmp_path / "latency.json"
    costs = liar.latency(model, batch_size=2, length=16, cache=file, progress=False)
    for site in layout_of(model).sites:
        levels = costs.sites[site.name]
        assert sorted(levels) == list(levels) == timing.widths(site.units)
        values = list(levels.values())
        assert values == sorted(values)
        assert values[-1] == 0
    assert costs.dense == costs.fixed > 0
    assert costs.unit_costs is None
    again = liar.latency(model, batch_size=2, length=16, cache=file, progress=False)
    assert again == costs == Costs.load(file)
    assert liar.latency(model, batch_size=1, length=16, cache=file, progress=False).about["batch_size"] == 1
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def times_of(layout, unit_cost, *, model, block):
    """Seconds as they would be measured if a unit of each kind cost the same, `block` times as much in single blocks."""

    def of(units):
        return sum(unit_cost[site.kind] * units(site) for site in layout.sites)

    seconds = {timing.FULL: model + of(lambda site: site.units), timing.HALF: model + of(timing._middle)}
    for site in layout.sites:
        others = sum(unit_cost[other.kind] * other.units for other in layout.of_block(site.block) if other is not site)
        for count in timing.widths(site.units):
            seconds[timing._layer(layout, site, count)] = block * (others + unit_cost[site.kind] * count)
    return seconds


@pytest.mark.parametrize("block", [0.7, 1.0, 1.4])
def test_what_single_blocks_save_is_scaled_to_the_model(block):
    layout = layout_of(tiny_model("llama", hidden_size=64, intermediate_size=512))
    unit_cost = {"heads": 0.25, "neurons": 0.002}
    costs = timing._costs(layout, times_of(layout, unit_cost, model=3.0, block=block), {})
    for way in itertools.islice(itertools.product(*(costs.sites[site.name] for site in layout.sites)), 0, None, 7):
        kept = dict(zip(costs.sites, way, strict=True))
        expected = 3.0 + sum(unit_cost[site.kind] * kept[site.name] for site in layout.sites)
        assert costs.of(kept) == pytest.approx(expected, rel=1e-9)


def test_a_model_that_half_of_its_units_make_no_faster():
    """Then no budget below all of the time can be met; and where blocks save nothing, nothing is made up."""
    layout = layout_of(tiny_model("bert"))
    seconds = times_of(layout, {"heads": 0.25, "neurons": 0.002}, model=3.0, block=1.0)
    slower = timing._costs(layout, seconds | {timing.HALF: seconds[timing.FULL] + 1}, {})
    assert {cost for levels in slower.sites.values() for cost in levels.values()} == {0.0}
    with pytest.raises(BudgetError, match="cannot be met"):
        Budget.of(layout, slower, SelectOptions(0.9))
    flat = timing._costs(layout, dict.fromkeys(seconds, 1.0) | {timing.HALF: 0.1}, {})
    assert {cost for levels in flat.sites.values() for cost in levels.values()} == {0.0}


def test_the_half_model_that_is_timed():
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    layout, half = layout_of(model), timing._half(model, layout_of(model))
    for site in layout.sites:
        consumer = layer_of(half.get_submodule(site.block), site.consumer)
        assert consumer.size("in") == timing._middle(site) * site.consumer.width
    first, second = (half.get_submodule(name) for name in layout.blocks[:2])
    assert all(one is other for one, other in zip(first.parameters(), second.parameters(), strict=True))
    ids = torch.randint(model.config.vocab_size, (2, 5))
    assert torch.isfinite(half(ids)[0]).all()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_times_with_gaps_have_no_cost_per_unit_even_if_they_are_all_alike():
    """As on a busy machine, where a tiny layer takes as long at every width: only the widths that were timed may stay."""
    assert Costs("seconds", 1.0, {"neurons.0": {8: 0.0, 16: 0.0}}).unit_costs is None
    assert Costs("seconds", 1.0, {"neurons.0": {1: 0.5, 2: 1.0}}).unit_costs == {"neurons.0": 0.5}
    assert Costs("seconds", 1.0, {"neurons.0": {1: 0.6, 2: 1.0}}).unit_costs is None
    assert Costs("seconds", 1.0, {"neurons.0": {1: 0.5, 2: 1.0}, "heads.0": {2: 1.0}}).unit_costs is None


def test_a_budget_in_time():
    model = tiny_model("llama", hidden_size=64, intermediate_size=512)
    costs, batches = timed(model), tiny_batches(model)
    mask = liar.select(model, batches, keep=0.6, budget=costs, progress=False)
    assert all(mask.kept(name) in costs.sites[name] for name in mask.masks)
    assert 0.5 * costs.dense < costs.of({name: mask.kept(name) for name in mask.masks}) <= 0.6 * costs.dense
    liar.reconstruct(model, mask, batches, progress=False)
    with pytest.raises(BudgetError, match=r"another model: \w+\.\d has \d+ units in this one and \d+ there"):
        liar.select(model, batches, keep=0.6, budget=costs, progress=False)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"length": 33}, "length=33: BertModel takes at most 32 tokens in a sequence; give a smaller length"),
        ({"length": 0}, "length=0: expected a whole number, at least 1"),
        ({"batch_size": -1}, "batch_size=-1: expected a whole number, at least 1"),
    ],
)
def test_a_batch_that_cannot_be_timed(batch, message):
    with pytest.raises(OptionError, match=message):
        liar.latency(tiny_model("bert", max_position_embeddings=32), **batch)


def test_a_batch_beyond_all_memory():
    with pytest.raises(OptionError, match="such a batch cannot be timed here"):
        liar.latency(tiny_model("bert"), batch_size=2**31 - 1, length=32, progress=False)


@pytest.mark.parametrize("keep", [0, -0.5, 1.5, float("nan"), None])
def test_an_impossible_share_is_refused_before_anything_is_timed(keep, capsys):
    with pytest.raises(OptionError, match=f"keep={keep}: expected the share that stays, above 0 and at most 1"):
        liar.select(tiny_model("bert"), keep=keep, budget="latency")
    assert capsys.readouterr().err == ""


def test_timing_without_a_bar(quick, capsys):
    model = tiny_model("bert", max_position_embeddings=128, num_hidden_layers=1, intermediate_size=4)
    # A tiny model takes about as long whatever it keeps, so only all of it is sure to be within the budget.
    liar.select(model, keep=1, criterion="magnitude", budget="latency")
    assert "latency: " in capsys.readouterr().err
    liar.select(model, keep=1, criterion="magnitude", budget="latency", progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("units", [1, 4, 172, 300, 1536])
def test_widths_that_are_timed(units):
    result = timing.widths(units)
    assert result[-1] == units
    assert result == sorted(set(result))
    assert result[0] >= 1
    assert len(result) <= 17


@pytest.mark.parametrize(
    ("units", "expected"), [(1, [1]), (4, [1, 2, 3, 4]), (1536, [96 * i for i in range(1, 17)]),
    (300, [16, 32, 56, 72, 88, 112, 128, 144, 168, 184, 200, 224, 240, 256, 280, 296, 300])],
)  # fmt: skip
def test_wide_layers_are_timed_at_multiples_of_eight(units, expected):
    assert timing.widths(units) == expected


def test_a_file_that_is_something_else(tmp_path):
    with pytest.raises(BudgetError, match=r"missing: .*No such file"):
        Costs.load(tmp_path / "missing")
    for name, text in (("text", "no costs"), ("list", "[1]"), ("other", '{"name": 1}')):
        (tmp_path / name).write_text(text)
        with pytest.raises(BudgetError, match=f"{name}: expected costs as Costs.save or `liar latency` writes them"):
            Costs.load(tmp_path / name)


@pytest.mark.parametrize(
    ("fixed", "sites"),
    [
        (nan, {}), (inf, {}), (-1, {}), ("1", {}), (True, {}), (0, ()), (0, {"heads.0": 3}), (0, {"heads.0": {1: nan}}),
        (0, {"heads.0": {1: -inf}}), (0, {"heads.0": {1: "a"}}), (0, {"heads.0": {"1": 1}}), (0, {"heads.0": {-1: 1}}),
        (0, {3: {1: 1}}),
    ],
    ids=str,
)  # fmt: skip
def test_costs_that_are_none(fixed, sites):
    with pytest.raises(BudgetError, match="expected"):
        Costs("a", fixed, sites)


def test_costs_of_nothing():
    model = tiny_model("bert")
    free = {site.name: dict.fromkeys(range(1, site.units + 1), 0.0) for site in layout_of(model).sites}
    with pytest.raises(BudgetError, match="are 0: there is nothing to keep a share of"):
        liar.select(model, keep=0.5, criterion="random", budget=Costs("a", 0.0, free))


@pytest.mark.parametrize("text", ["", "null", "[" * 100_000, '{"name": "a", "fixed": NaN, "sites": {}, "about": {}}',
                                  '{"name": "a", "fixed": -1, "sites": {}, "about": {}}',
                                  '{"name": "a", "fixed": 0, "sites": {"heads.0": {"1": Infinity}}, "about": {}}',
                                  '{"name": "a", "fixed": 1' + "0" * 400 + ', "sites": {}, "about": {}}'])  # fmt: skip
def test_files_that_hold_no_costs(text):
    with pytest.raises(BudgetError, match=r"expected (finite )?(a )?costs?"):
        Costs.from_json(text)


def test_what_a_unit_is_worth_is_weighed_against_what_it_costs():
    """Per parameter, heads are worth a little more than neurons; per FLOP they are worth less."""
    model = tiny_model("bert")
    layout = layout_of(model)
    scores = {s.name: torch.full([s.units], 1.1 if s.kind == "heads" else 1.0).double() for s in layout.sites}
    kept = {}
    for costs in (params(model), liar.flops(model, length=64)):
        budget = Budget.of(layout, costs, SelectOptions(0.55))
        mask = allocate(scores, layout, budget, "free", comparable=True)
        kept[costs.name] = [sum(mask.kept(site.name) for site in layout.of_kind(kind)) for kind in ("heads", "neurons")]
    heads, neurons = kept["FLOPs"]
    assert kept["parameters"][0] == 8
    assert heads < 4
    assert neurons > 100


@pytest.mark.parametrize("name", [None, "", 3, np.int8(1)])
def test_costs_say_what_is_counted(name):
    with pytest.raises(BudgetError, match="name: expected a text that says what is counted"):
        Costs(name, 0.0, {"neurons.0": {1: 1.0}})
