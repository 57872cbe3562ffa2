"""Options: every default and check stands once, and the library's signatures, tables and errors are those of the options."""

import dataclasses
import inspect
from functools import partial
from importlib import import_module
from math import inf, nan
from pathlib import Path

import numpy as np
import pytest
import torch

import liar
from liar import options
from liar.errors import LiarError, OptionError
from liar.options import (
    CalibrationOptions,
    GenerateOptions,
    LoadOptions,
    PlanOptions,
    PruneOptions,
    ReconstructOptions,
    RefineOptions,
    RunOptions,
    SelectOptions,
    SourceOptions,
    TeacherOptions,
    UnstructuredOptions,
)
from liar.repair import RepairContext, closed_form_steps
from liar.selection import CRITERIA
from liar.solve import solvers
from liar.statistics import Factor
from liar.testing import tiny_batches, tiny_model

CLASSES = (
    SelectOptions,
    PruneOptions,
    RunOptions,
    ReconstructOptions,
    RefineOptions,
    TeacherOptions,
    CalibrationOptions,
    SourceOptions,
    LoadOptions,
    GenerateOptions,
    PlanOptions,
    UnstructuredOptions,
)
# What an option without a default is given here.
REQUIRED = {
    SelectOptions: {"keep": 0.5},
    SourceOptions: {"calib": "texts.txt"},
    GenerateOptions: {"tokens": 1000},
    PlanOptions: {"tokens": 1000},
}
COUNTS = [0, -1, 1.5, "3", True, np.float32(2), np.True_, 2**31, 10**400, b"3", [3], {}]
# class -> option -> bad values, and what the error says was expected
BAD = {
    SelectOptions: {
        "keep": (
            [0, -0.1, 1.0001, nan, inf, None, "0.5", True, 10**400, [0.5], np.array([0.5])],
            "expected the share that stays, above 0 and at most 1",
        ),
        "criterion": (
            ["luck", None, ["wanda"], np.array(["wanda"]), {}],
            "expected one of 'reconstruction', 'fluctuation', 'wanda'",
        ),
        "budget": (["time", None, 5, 1.5], "expected one of 'params', 'flops', 'latency'"),
        "widths": (["any", "layer", None], "expected one of 'free', 'balanced', 'uniform'"),
        "heads": (["queries", 3, None], "expected one of 'group', 'query'"),
        "round_to": ([*COUNTS, None], "expected a whole number, at least 1"),
        "protect": (
            ["heads.0", b"heads.0", 3, None, np.array(3)],
            "expected a list of names of sites and numbers of layers, got a ",
        ),
    },
    ReconstructOptions: {
        "target": (["dense_stream", None], "expected one of 'damped_stream', 'residual_stream', 'layer_output'"),
        "ridge": ([-1, nan, inf, "none", None, True, 1.1e12, 1e308, 10**400, [1], {}], 'expected "auto" or a number >= 0'),
        "solver": (["qr"], "expected one of 'auto', 'cholesky', 'eigh', 'lstsq'"),
        "bias": (["keep", False], "expected one of 'preserve', 'create'"),
        "quality": (
            ["all", -1, 1.5, None, True, 2**31, 10**400, [1], np.float32(2)],
            'expected "auto" or a number of sequences',
        ),
    },
    PruneOptions: {"steps": ([*COUNTS, None], "expected a whole number, at least 1")},
    RefineOptions: {
        "granularity": (["row", None, 1.5, True], "expected one of 'matrix', 'sublayer', 'block', or a number of blocks"),
        "propagation": (["both", None], "expected one of 'global', 'pruned', 'dense'"),
        "epochs": ([*COUNTS, None], "expected a whole number, at least 1"),
        "sequences": ([*COUNTS, None], "expected a whole number, at least 1"),
        "learning_rate": ([0, -1, 2, nan, inf, None, "1", True], "expected a learning rate, above 0 and at most 1"),
        "warmup": ([-0.1, 1.1, nan, None, "0", True], "expected a share from 0 to 1"),
        "patience": ([*COUNTS, None], "expected a whole number, at least 1"),
        "lora": (COUNTS, "expected a whole number, at least 1"),
    },
    TeacherOptions: {"teacher": ([3, "", ["bert"]], "expected a text")},
    CalibrationOptions: {
        "max_length": ([*COUNTS, None], "expected a whole number, at least 1"),
        "batch_size": ([*COUNTS, None], "expected a whole number, at least 1"),
        "tokens": (COUNTS, "expected a whole number, at least 1"),
    },
    GenerateOptions: {
        "tokens": ([*COUNTS, None], "expected a whole number, at least 1"),
        "max_length": ([5, 1], "expected at least 6: one random token, the next 4 greedily, and one that is sampled"),
        "batch_size": ([*COUNTS, None], "expected a whole number, at least 1"),
        "language": (["", None, 5, ["en"]], "expected a text"),
        "seed": ([0.5, None, "x"], "expected a whole number"),
    },
    PlanOptions: {
        "tokens": ([*COUNTS, None], "expected a whole number, at least 1"),
        "max_length": ([*COUNTS, None], "expected a whole number, at least 1"),
        "batch_size": ([*COUNTS, None], "expected a whole number, at least 1"),
        "activations": (["gpu", 3, True], "expected one of 'device', 'host', 'disk'"),
        "offload": ([1, None, "yes"], "expected True or False"),
        "measure": ([0, None, "no"], "expected True or False"),
    },
    UnstructuredOptions: {
        "sparsity": (
            [0, 1, -0.1, 1.5, nan, inf, None, True, "0.5", "4:2", "2:2", "0:4", "2:", ":4", "2:4:8", "1:65", [0.5], "²:4"],
            "expected the share of weights that is removed, above 0 and below 1, or a pattern",
        ),
        "criterion": (["taylor", None], "expected one of 'magnitude', 'wanda', 'sparsegpt'"),
    },
    RunOptions: {
        "activations": (["gpu", None, True], "expected one of 'device', 'host', 'disk', 'auto'"),
        "run_folder": ([3, "", ["run"], b"run"], "expected a text"),
    },
    LoadOptions: {
        "dtype": (["int8", None], "expected one of 'auto', 'float32', 'bfloat16', 'float16'"),
        "weights": (["gpu", None, True], "expected one of 'device', 'host', 'disk'"),
    },
}
# Any text, switch or number will do, as far as can be said before the model and the data are there.
UNCHECKED = {"seed", "refit", "set_aside", "pack", "mixed_lengths", "calib", "config", "split", "column", "device"}
GOOD = [
    SelectOptions(1),
    SelectOptions(1e-9, protect=["heads.0", 1], round_to=8, budget="flops"),
    SelectOptions(0.5, budget=liar.Costs("seconds", 1.0, {"heads.0": {1: 0.5}})),
    SelectOptions(0.5, protect=()),
    ReconstructOptions(ridge=0),
    ReconstructOptions(ridge=1e-3, refit=False, target="layer_output", solver="lstsq", bias="create"),
    CalibrationOptions(tokens=None, max_length=1, batch_size=1),
    SelectOptions(np.float32(0.5), round_to=np.int64(8), seed=np.int32(3)),
    ReconstructOptions(ridge=np.float64(0.1), refit=np.True_),
    ReconstructOptions(quality=0),
    RunOptions("disk", Path("run")),
    RunOptions("auto", "run"),
    ReconstructOptions(quality=np.int64(8), set_aside=True),
    CalibrationOptions(tokens=np.int64(10)),
    GenerateOptions(np.int64(10), max_length=6, language="off"),
    RefineOptions(granularity=3, lora=8, warmup=0),
    RefineOptions(granularity=np.int64(2), learning_rate=np.float32(1e-3), warmup=1),
    UnstructuredOptions("1:64", criterion="sparsegpt"),
    UnstructuredOptions(np.float32(0.3)),
]


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind, table in BAD.items() for name in table],
    ids=lambda part: getattr(part, "__name__", part),
)
def test_a_bad_value_is_named(kind, name):
    values, says = BAD[kind][name]
    for value in values:
        group = kind(**{**REQUIRED.get(kind, {}), name: value})
        with pytest.raises(OptionError) as caught:
            group.check()
        assert str(caught.value).startswith(f"{name}={value!r}")
        assert says in str(caught.value)
        assert isinstance(caught.value, LiarError)


@pytest.mark.parametrize("group", GOOD, ids=lambda group: type(group).__name__)
def test_good_values_pass(group):
    group.check()


@pytest.mark.parametrize("kind", CLASSES)
def test_defaults_pass(kind):
    kind(**REQUIRED.get(kind, {})).check()


@pytest.mark.parametrize("kind", CLASSES)
def test_every_choice_passes(kind):
    for each, option in options.options_in(kind):
        for choice in option.choices or ():
            kind(**{**REQUIRED.get(kind, {}), each.name: choice}).check()


def test_every_option_is_tried():
    names = {each.name for each, _ in options.options_in(*CLASSES)}
    assert names == {name for table in BAD.values() for name in table} | UNCHECKED


@pytest.mark.parametrize("kind", CLASSES)
def test_options_are_frozen_and_explained(kind):
    group = kind(**REQUIRED.get(kind, {}))
    for each, option in options.options_in(kind):
        assert option.help.endswith((".", "…"))
        assert all((option.choices or {}).values())
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(group, each.name, 1)


@pytest.mark.parametrize(
    ("verb", "kinds", "own"),
    [
        (liar.select, [SelectOptions, RunOptions], {"model", "calib", "progress"}),
        (liar.reconstruct, [ReconstructOptions, RunOptions], {"model", "mask", "calib", "teacher", "held_out", "progress"}),
        (liar.refine, [RefineOptions], {"model", "teacher", "calib", "progress"}),
        (liar.prune, [SelectOptions, PruneOptions, ReconstructOptions, RunOptions], {"model", "calib", "held_out", "progress"}),
        (liar.calibration, [CalibrationOptions], {"texts", "tokenizer", "progress"}),
        (liar.self_generate, [GenerateOptions], {"model", "tokenizer", "file", "progress"}),
        (liar.unstructured.prune, [UnstructuredOptions], {"model", "calib", "progress"}),
    ],
)
def test_keywords_and_defaults_are_those_of_the_classes(verb, kinds, own):
    parameters = inspect.signature(verb).parameters
    fields = [field for kind in kinds for field in dataclasses.fields(kind)]
    assert parameters.keys() == {field.name for field in fields} | own
    for field in fields:
        expected = parameters[field.name].empty if field.default is dataclasses.MISSING else field.default
        assert parameters[field.name].default == expected, field.name
        assert parameters[field.name].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize(
    ("kind", "name"), [(k, name) for k in (SelectOptions, ReconstructOptions, RunOptions) for name in BAD[k]]
)
def test_verbs_check_options_before_they_look_at_anything(kind, name):
    """There is no model to look at."""
    value = BAD[kind][name][0][0]
    keywords = {**REQUIRED.get(kind, {}), name: value}
    with pytest.raises(OptionError, match=f"^{name}="):
        liar.prune(None, None, **{"keep": 0.5, **keywords})
    verb = (
        partial(liar.reconstruct, mask=None) if kind is ReconstructOptions else partial(liar.select, **REQUIRED[SelectOptions])
    )
    with pytest.raises(OptionError, match=f"^{name}="):
        verb(model=None, calib=None, **keywords)


# Choices, and what the library does with them


def test_criteria_are_those_that_have_a_score():
    assert list(options.CRITERIA) == list(CRITERIA)


def test_criteria_of_weights_are_those_that_are_known():
    assert list(options.WEIGHT_CRITERIA) == list(liar.unstructured.CRITERIA)


def test_widths_and_budgets_are_those_that_selection_knows():
    assert options.WIDTHS.keys() == import_module("liar.selection.allocate").COMPARED.keys()
    assert (
        options.BUDGETS.keys()
        == import_module("liar.api.select").COSTS.keys()
        >= import_module("liar.api.prune").STEPPED.keys()
    )


def test_every_target_has_steps_of_its_own():
    def steps(**how):
        return tuple(type(step).__name__ for step in closed_form_steps(RepairContext(ReconstructOptions(**how), lambda: None)))

    assert {target: steps(target=target) for target in options.TARGETS} == {
        "damped_stream": ("RefitProducers", "FitToDampedStream"),
        "residual_stream": ("RefitProducers", "FitToResidualStream"),
        "layer_output": ("FitToLayerOutput",),
    }
    assert steps(target="residual_stream", refit=False) == ("FitToResidualStream",)


@pytest.mark.parametrize("solver", options.SOLVERS)
def test_every_solver_solves_with_what_it_is_named_after(solver, monkeypatch):
    used = []
    for name in ("cholesky", "eigh", "lstsq"):
        function = getattr(solvers, name)
        monkeypatch.setattr(
            solvers, name, lambda *arguments, name=name, function=function: used.append(name) or function(*arguments)
        )
    generator = torch.Generator().manual_seed(0)
    z, t = (torch.randn(40, width, generator=generator, dtype=torch.float64) for width in (5, 3))
    factor = Factor()
    factor.update(z, t)
    weight = torch.zeros(5, 3, dtype=torch.float64)
    change = solvers.solve(factor.normal(affine=False), weight, torch.zeros(1, dtype=torch.float64), solver).change[0]
    torch.testing.assert_close(change, torch.linalg.lstsq(z, t).solution)
    assert used == [{"auto": "cholesky"}.get(solver, solver)]


def test_what_happens_to_biases():
    biases = {}
    for bias in options.BIASES:
        model = tiny_model("llama")
        report = liar.prune(model, tiny_batches(model, batches=1), keep=0.6, criterion="random", bias=bias, progress=False)
        biases[bias] = (model.layers[0].mlp.down_proj.bias is not None, all(site.bias_created for site in report.sites))
    assert biases == {"preserve": (False, False), "create": (True, True)}


def test_dtypes_are_those_of_torch():
    assert all(getattr(torch, name).is_floating_point for name in options.DTYPES if name != "auto")


def test_the_table_for_the_docs():
    lines = options.options_table(SelectOptions, LoadOptions).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]
    assert [row[0] for row in rows] == [f"`{each.name}`" for each, _ in options.options_in(SelectOptions, LoadOptions)]
    table = {row[0]: row[1:] for row in rows}
    assert table["`keep`"] == ["required", "Share to keep of what the budget counts, above 0 and at most 1."]
    assert table["`round_to`"][0] == "`1`"
    assert table["`widths`"][0] == "`'free'`"
    for name, meaning in options.WIDTHS.items():
        assert f"<br>`{name}`: {meaning}" in table["`widths`"][1]


@pytest.mark.parametrize("keep", [np.int8(1), np.float16(0.5), np.uint8(1)])
def test_small_numbers_of_numpy_do_not_overflow(keep):
    model = tiny_model("bert")
    mask = liar.select(model, keep=keep, criterion="random", round_to=np.uint8(4), seed=np.int8(100))
    assert mask == liar.select(model, keep=float(keep), criterion="random", round_to=4, seed=100)
    costs = liar.flops(model, length=np.uint8(200))
    assert costs.dense == liar.flops(model, length=200).dense


@pytest.mark.parametrize("seed", [10**400, 2**63, -(2**70), 1.5, "1", None])
def test_seeds_that_are_none(seed):
    with pytest.raises(OptionError, match=r"seed=.*expected a whole number"):
        liar.select(tiny_model("bert"), keep=0.5, criterion="random", seed=seed)


@pytest.mark.parametrize("length", [0, -1, 0.5, nan, inf, None, "a", [], 10**400, True])
def test_lengths_that_are_none(length):
    for call in (liar.flops, liar.latency):
        with pytest.raises(OptionError, match=r"length=.*expected a whole number, at least 1"):
            call(tiny_model("bert"), length=length)


def test_everything_protected():
    """Nothing is left to choose: all of it stays where all of it may, and less cannot be met."""
    model = tiny_model("bert")
    everything = [site.name for site in liar.discover(model).sites]
    for widths in ("free", "balanced"):
        mask = liar.select(model, keep=1.0, criterion="random", protect=everything, widths=widths)
        assert all(mask.keeps_all(name) for name in everything)
        with pytest.raises(liar.LiarError, match="cannot be met"):
            liar.select(model, keep=0.9, criterion="random", protect=everything, widths=widths)


def test_costs_as_a_mapping_are_refused():
    with pytest.raises(OptionError, match=r"expected liar\.Costs, got a mapping; liar\.Costs\.from_json"):
        liar.select(tiny_model("bert"), keep=0.5, criterion="random", budget={})


@pytest.mark.parametrize("sites", ["heads.0", [[]], [None], [3], np.array(["heads.9"]), ["heads.9"], [np.eye(2)]])
def test_sites_that_are_none(sites):
    model = tiny_model("bert")
    with pytest.raises(LiarError, match=r"no such site|expected a list"):
        liar.moments(model, tiny_batches(model), sites=sites, progress=False)


def test_numbers_that_python_does_not_write():
    with pytest.raises(OptionError, match="round_to=a huge number: expected a whole number"):
        liar.select(tiny_model("bert"), keep=0.5, criterion="random", round_to=10**5000)


@pytest.mark.parametrize("make", [iter, lambda names: (name for name in names), lambda names: map(str, names)])
def test_iterators_in_place_of_lists(make):
    """They would be used up by the time they are needed, and protect nothing."""
    model = tiny_model("bert")
    for call in (
        lambda: liar.select(model, keep=0.5, criterion="random", protect=make(["heads.0"])),
        lambda: liar.collect(model, tiny_batches(model), criteria=make(["wanda"]), progress=False),
        lambda: liar.moments(model, tiny_batches(model), sites=make(["heads.0"]), progress=False),
    ):
        with pytest.raises(OptionError, match="expected a list of"):
            call()


def test_no_message_is_longer_than_a_screen():
    model = tiny_model("bert")
    for call in (
        lambda: liar.select(model, keep=0.5, criterion="x" * 10**6),
        lambda: liar.Mask.of({"x" * 10**6: [1]}, liar.discover(model)),
        lambda: liar.load("x" * 10**6),
        lambda: liar.Mask.from_json("x" * 10**6),
        lambda: liar.prune(model, [{"x" * 10**6: 1}], keep=0.5),
    ):
        with pytest.raises(LiarError) as caught:
            call()
        assert 10 < len(str(caught.value)) < 2000
    assert " … " in str(caught.value)
    assert str(LiarError("a" * 1500)) == "a" * 1500
