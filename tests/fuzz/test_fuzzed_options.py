"""Every option with a value it should not have, through the library and through the command line."""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from commands import command
from hypothesis import example
from hypothesis import strategies as st
from strategies import FLOATS, HUGE, INTEGERS, ODD, SCALARS, inputs
from unchanged import Refused, assert_runs, attempt

import liar
from liar.options import (
    CalibrationOptions,
    LoadOptions,
    ReconstructOptions,
    SelectOptions,
    SourceOptions,
    option_of,
)
from liar.selection import CRITERIA
from liar.testing import tiny_batches, tiny_model

MODELS = {name: tiny_model(name) for name in ("bert", "llama")}
BATCHES = {name: tiny_batches(model, batches=1) for name, model in MODELS.items()}
MOMENTS = liar.moments(MODELS["bert"], BATCHES["bert"], progress=False)
TEXTS = ["w1 w2 w3", ("a text", "another one"), " ".join(f"w{number % 80}" for number in range(200))]
COSTS = liar.flops(MODELS["bert"])


@dataclass(frozen=True)
class Unmade:
    """What `liar.Costs` is to be made of, if it accepts that."""

    name: Any
    fixed: Any
    sites: Any
    about: Any = None


def made(options):
    """Options with costs that are made here and now."""
    return {name: liar.Costs(*vars(each).values()) if isinstance(each, Unmade) else each for name, each in options.items()}


# By option what may be given beside odd values, so that calls get further than the first check.
NUMBERS = st.one_of(INTEGERS, FLOATS)
LEVELS = st.dictionaries(st.one_of(st.integers(0, 5), SCALARS), st.one_of(FLOATS, SCALARS), max_size=4)
MORE = {
    "keep": st.one_of(FLOATS, st.sampled_from([1, 1.0, 0.01, 0.999])),
    "ridge": FLOATS,
    "protect": st.lists(st.one_of(st.sampled_from(["heads.0", "neurons.1", 0, 1, 2, -1, True]), SCALARS), max_size=4),
    "round_to": st.sampled_from([1, 3, 8, 64, 65]),
    "budget": st.builds(
        Unmade,
        st.just("odd") | ODD,
        FLOATS | ODD,
        st.dictionaries(st.sampled_from(list(COSTS.sites)), LEVELS) | st.just(COSTS.sites) | ODD,
        ODD,
    ),
    "device": st.sampled_from(["meta", "cuda", "cpu:7", "xla", "mps", "cpu:", "-1", "2"]),
    "calib": st.sampled_from(
        ["texts.txt", "one", ".", "missing.txt", "bert/config.json", "squad", "a/b", "http://x/y.txt", "*"]
    ),
}


def values(*groups, odd=ODD):
    """Values by option for one or two options of some groups."""
    by_name = {}
    for each in (each for group in groups for each in fields(group)):
        choices = option_of(each).choices
        usual = st.sampled_from(list(choices)) if choices else st.booleans() | st.integers(1, 20)
        by_name[each.name] = st.one_of(odd, usual, MORE.get(each.name, usual))
    some = st.lists(st.sampled_from(list(by_name)), min_size=1, max_size=2, unique=True)
    return some.flatmap(lambda names: st.fixed_dictionaries({name: by_name[name] for name in names}))


NAMES = st.sampled_from(list(MODELS))


# too large for a float, too small for a sum
@example(name="bert", options={"keep": HUGE})
@example(name="bert", options={"keep": np.int8(1)})
# no array has a truth value
@example(name="bert", options={"widths": np.array([])})
@example(name="bert", options={"criterion": "x" * 5000})
# costs of a wrong type inside
@example(name="bert", options={"budget": {}})
@example(name="bert", options={"budget": Unmade("odd", 1, ())})
@example(name="bert", options={"budget": Unmade("odd", 1, {"heads.0": {None: 1, "a": 2}})})
@example(name="bert", options={"budget": Unmade("odd", (), COSTS.sites)})
@example(name="bert", options={"budget": Unmade("odd", float("nan"), COSTS.sites)})
@inputs(100, name=NAMES, options=values(SelectOptions))
def test_select(name, options):
    model = MODELS[name]
    options = {"keep": 0.5, "criterion": "magnitude", **options}
    batches = None if str(options["criterion"]) in ("magnitude", "random") else BATCHES[name]
    mask = attempt(lambda: liar.select(model, batches, progress=False, **made(options)), model)
    if not isinstance(mask, Refused):
        assert liar.Mask.of(mask, liar.discover(model)) == mask
        assert liar.Mask.from_json(mask.to_json()) == mask


@inputs(60, name=NAMES, options=values(ReconstructOptions, SelectOptions))
def test_prune(name, options):
    model = copy.deepcopy(MODELS[name])
    options = {"keep": 0.5, "criterion": "magnitude", **options}
    report = attempt(lambda: liar.prune(model, BATCHES[name], progress=False, **made(options)), model, changes=True)
    if not isinstance(report, Refused):
        assert_runs(model, [2, 4, 32])
        assert liar.Report.from_json(report.to_json()).to_json() == report.to_json()
        assert "parameters kept" in str(report)


@example(name="llama", options={"ridge": HUGE}, mask={"neurons.1": [0, 5]})
@example(name="llama", options={"ridge": 1e308}, mask={"neurons.1": [0, 5]})
@inputs(
    50, name=NAMES, options=values(ReconstructOptions), mask=st.sampled_from([{"heads": [[0], [1]]}, {"neurons.1": [0, 5]}])
)
def test_reconstruct(name, options, mask):
    model = copy.deepcopy(MODELS[name])
    report = attempt(lambda: liar.reconstruct(model, mask, BATCHES[name], progress=False, **options), model, changes=True)
    if not isinstance(report, Refused):
        assert_runs(model, [2, 4, 32])


# larger than a word of the machine
@example(options={"max_length": 10**30})
@inputs(60, options=values(CalibrationOptions))
def test_calibration(tokenizer, options):
    batches = attempt(lambda: liar.calibration(TEXTS, tokenizer, **options))
    if not isinstance(batches, Refused):
        assert liar.Calibration.of(batches, MODELS["bert"]).tokens >= 1


@example(number=0, criteria=[[]], ridge=0.0)
@example(number=float("nan"), criteria=[None, 3], ridge=0.0)
@example(number=np.uint8(1), criteria=np.array([]), ridge=0.0)
@example(number=None, criteria=torch.ones(2, 2), ridge=0.0)
@example(number=HUGE, criteria=[], ridge=HUGE)
@example(number=1, criteria=np.array(7), ridge=0.0)
@example(number=1, criteria=[np.eye(2) > 0], ridge=0.0)
@example(number=1, criteria=["a"], ridge=0.0)
@example(number=0, criteria=1j, ridge=0.0)
@example(number=0, criteria=torch.tensor([float("nan")]), ridge=0.0)
@example(number=0, criteria=1e308, ridge=0.0)
@inputs(
    40, number=NUMBERS | ODD, criteria=st.lists(st.sampled_from(list(CRITERIA)) | ODD, max_size=2) | ODD, ridge=FLOATS | ODD
)
def test_what_else_takes_options(number, criteria, ridge):
    model, batches = MODELS["bert"], BATCHES["bert"]
    costs = attempt(lambda: liar.flops(model, length=number), model)
    assert isinstance(costs, Refused) or 0 < float(costs.dense) < float("inf")
    attempt(lambda: liar.collect(model, batches, criteria=criteria, progress=False), model)
    attempt(lambda: liar.moments(model, batches, sites=criteria, progress=False), model)
    kept = [True, False, True, True]
    for mask, solver, moments in (
        (kept, number, MOMENTS["heads.0"]),
        (criteria, "auto", MOMENTS["heads.0"]),
        (kept, "eigh", number),
    ):
        attempt(lambda m=moments, k=mask, s=solver: liar.interpolation(m, k, ridge=ridge, solver=s))


GIVEN = {
    "prune": [SelectOptions, ReconstructOptions, SourceOptions, CalibrationOptions, LoadOptions],
    "select": [SelectOptions, SourceOptions, CalibrationOptions, LoadOptions],
}
# A command line holds no NUL.
SHOWN = SCALARS.map(lambda value: str(value).replace("\0", ""))
LINES = st.one_of(*(st.tuples(st.just(name), values(*groups, odd=SHOWN)) for name, groups in GIVEN.items()))


# too long for the name of a file
@example(line=("prune", {"budget": "x" * 5000}))
@example(line=("select", {"widths": "x" * 5000}))
@example(line=("select", {"device": "meta"}))
@inputs(60, line=LINES)
def test_command_line(home, line):
    name, options = line
    options = {"keep": 0.5, "criterion": "magnitude", "calib": home / "texts.txt", "tokens": 200, **options}
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in options.items() if not isinstance(value, bool)]
    flags += [f"--{'' if value else 'no-'}{key.replace('_', '-')}" for key, value in options.items() if isinstance(value, bool)]
    out = home / "out"
    try:
        if not isinstance(command(name, home / "bert", out, *flags, folder=home), Refused):
            if name == "prune":
                assert_runs(liar.load(out))
            else:
                liar.Mask.load(out)
    finally:
        shutil.rmtree(out, ignore_errors=True)
        out.unlink(missing_ok=True)
