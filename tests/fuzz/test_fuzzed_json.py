"""Every reader of files that this library writes, given JSON of any kind."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import strategies
import torch
from commands import command
from hypothesis import example
from hypothesis import strategies as st
from safetensors.torch import load, save
from strategies import HUGE, JSON, ODD, inputs, json_files, mutated, with_value
from unchanged import Refused, assert_runs, attempt

import liar
from liar.cli.run import Run
from liar.options import CalibrationOptions, LoadOptions, ReconstructOptions, SelectOptions, SourceOptions
from liar.testing import tiny_batches, tiny_model

MODEL = tiny_model("bert")
LAYOUT = liar.discover(MODEL)
MASK = liar.select(MODEL, keep=0.5, criterion="magnitude")
REPORT = liar.prune(tiny_model("bert"), tiny_batches(MODEL, batches=1), keep=0.5, criterion="magnitude", progress=False)
# The same text in every run.
REPORT = replace(REPORT, seconds={"fit": 1.5}, sites=tuple(replace(site, seconds=0.5) for site in REPORT.sites))
COSTS = liar.flops(MODEL)
# As seen from the working directory of these tests.
RUN = Run(
    "prune",
    "../../bert",
    "out",
    SourceOptions("../../texts.txt"),
    CalibrationOptions(tokens=200),
    LoadOptions(),
    ReconstructOptions(),
    SelectOptions(0.5, "magnitude"),
)
RUNS = [RUN, replace(RUN, command="reconstruct", select=None, mask=json.loads(MASK.to_json()))]
RUNS.append(replace(RUN, select=replace(RUN.select, budget=json.loads(COSTS.to_json()))))


def _read(reader, content):
    """What a reader makes of a file, which has to be what its other reader makes of the text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "some.json"
        path.write_bytes(content)
        result = attempt(lambda: reader.load(path), folder=Path(folder))
    text = content.decode(errors="replace")
    again = attempt(lambda: reader.from_json(text))
    assert isinstance(result, Refused) or again.to_json() == result.to_json()
    return again


@example(content=with_value(MASK.to_json(), "mask", "heads.0", "kept", new=[[67, "x" * 5000]]))
@example(content=with_value(MASK.to_json(), "mask", "heads.0", "units", new=10**11))
@example(content=with_value(MASK.to_json(), "requested", new={}))
@inputs(50, content=json_files(MASK.to_json()))
def test_mask(content):
    mask = _read(liar.Mask, content)
    if not isinstance(mask, Refused):
        assert all(row.ndim == 1 and row.dtype == torch.bool for row in mask.masks.values())
        assert liar.Mask.from_json(mask.to_json()) == mask
        attempt(lambda: liar.Mask.of(mask, LAYOUT))


# read without a look at the types, shown later
@example(content=with_value(REPORT.to_json(), "achieved", new=HUGE))
@example(content=with_value(REPORT.to_json(), "requested", new="a"))
@example(content=with_value(REPORT.to_json(), "parameters", new=[]))
@example(content=with_value(REPORT.to_json(), "tokens", new=[]))
@example(content=with_value(REPORT.to_json(), "seconds", new=3))
@example(content=with_value(REPORT.to_json(), "sites", 0, "site", new={}))
@inputs(50, content=json_files(REPORT.to_json()))
def test_report(content):
    report = _read(liar.Report, content)
    if not isinstance(report, Refused):
        assert liar.Report.from_json(report.to_json()).to_json() == report.to_json()
        assert len(report.rows()) == len(report.sites)
        assert str(report)


@example(content=with_value(COSTS.to_json(), "fixed", new=-math.inf))
@example(content=with_value(COSTS.to_json(), "sites", "heads.0", "4", new=math.inf))
@example(content=with_value(COSTS.to_json(), "sites", "heads.0", "4", new=-1))
@inputs(50, content=json_files(COSTS.to_json()))
def test_costs(content):
    costs = _read(liar.Costs, content)
    if not isinstance(costs, Refused):
        assert 0 <= costs.fixed < math.inf
        # Measured costs are differences from the whole model's, and noise.
        assert all(-math.inf < cost < math.inf for levels in costs.sites.values() for cost in levels.values())
        assert liar.Costs.from_json(costs.to_json()) == costs
        mask = attempt(lambda: liar.select(MODEL, keep=0.5, criterion="magnitude", budget=costs), MODEL)
        assert isinstance(mask, Refused) or costs.of({name: mask.kept(name) for name in mask.masks}) <= costs.dense


STATISTICS = liar.collect(MODEL, tiny_batches(MODEL, batches=1), criteria=["wanda"], progress=False)
with tempfile.TemporaryDirectory() as _folder:
    STATISTICS.save(Path(_folder) / "statistics")
    WHOLE = (Path(_folder) / "statistics").read_bytes()
METADATA = {"norms": json.dumps(STATISTICS.norms), "tokens": str(STATISTICS.tokens)}
TENSOR = st.sampled_from([torch.ones(3), torch.tensor(1), torch.full((4,), math.nan), torch.ones(2, 2), -torch.ones(64)])
STATISTICS_FILES = st.one_of(
    st.binary(max_size=30),
    st.integers(0, len(WHOLE)).map(lambda size: WHOLE[:size]),
    st.builds(
        lambda metadata, changed: save({**load(WHOLE), **{name: value.clone() for name, value in changed.items()}}, metadata),
        st.one_of(
            st.none(),
            st.just(METADATA),
            mutated(METADATA, st.text("ab1é{}[]", max_size=4)).filter(
                lambda content: (
                    isinstance(content, dict)
                    and all(isinstance(each, str) and each.isprintable() for each in (*content, *content.values()))
                )
            ),
            json_files(METADATA["norms"]).map(lambda text: {**METADATA, "norms": text.decode(errors="replace")}),
        ),
        st.dictionaries(st.sampled_from([*load(WHOLE), "a", "heads.0/x", "/"]), TENSOR, max_size=2),
    ),
)


@example(content=save(load(WHOLE), {**METADATA, "norms": with_value(METADATA["norms"], "heads.0", new=[]).decode()}))
@example(content=save(load(WHOLE), {**METADATA, "norms": "[" * 100_000}))
@example(content=save({**load(WHOLE), "heads.0/mean": torch.ones(3)}, METADATA))
@inputs(40, content=STATISTICS_FILES)
def test_statistics(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "statistics"
        path.write_bytes(content)
        statistics = attempt(lambda: liar.CriterionStatistics.load(path), folder=Path(folder))
    if not isinstance(statistics, Refused):
        mask = attempt(lambda: liar.select(MODEL, statistics, keep=0.5, criterion="wanda"), MODEL)
        assert isinstance(mask, Refused) or liar.Mask.of(mask, LAYOUT) == mask


@example(path="x" * 5000)
@inputs(20, path=ODD | JSON)
def test_paths(path):
    for reader in (liar.Mask, liar.Report, liar.Costs, liar.CriterionStatistics):
        assert isinstance(attempt(lambda reader=reader: reader.load(path)), Refused)
    for reader in (liar.Mask, liar.Report, liar.Costs):
        attempt(lambda reader=reader: reader.from_json(path))


@example(content=with_value(REPORT.to_json(), "sites", 0, "kept", new=[]), plots=True)
@example(content=with_value(REPORT.to_json(), "sites", 0, "site", new=None), plots=True)
@example(content=with_value(REPORT.to_json(), "sites", new=[]), plots=True)
@inputs(40, content=json_files(REPORT.to_json()), plots=st.integers(0, 4).map(lambda number: number == 0))
def test_command_report(home, content, plots):
    (home / "some.json").write_bytes(content)
    command("report", home / "some.json", *(["--plot", home / "plot.svg"] if plots else []), folder=home)
    (home / "plot.svg").unlink(missing_ok=True)


def _carried_out(home, content, *arguments):
    """A command that reads a file writes a model that runs, or nothing."""
    (home / "some.json").write_bytes(content)
    keep = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    try:
        if not isinstance(command(*arguments, *(["--out"] if arguments[0] == "replay" else []), "out", folder=home), Refused):
            assert_runs(liar.load("out"))
            assert liar.Report.load("out/report.json").sites
            assert liar.Mask.load("out/mask.json").masks
        assert all(path.read_bytes() == before for path, before in keep.items())
    finally:
        shutil.rmtree("out", ignore_errors=True)


# no UTF-8
@example(content=b"h\xe1T")
# options of another command
@example(content=with_value(RUN.to_json(), "run", "refine", new={}))
@inputs(50, content=st.sampled_from(RUNS).flatmap(lambda run: json_files(run.to_json())))
def test_command_replay(home, content):
    _carried_out(home, content, "replay", home / "some.json")


# once shown after all the work was done
@example(content=with_value(MASK.to_json(), "requested", new={}))
@inputs(30, content=json_files(MASK.to_json()) | json_files(json.dumps({"heads": [[0], [1, 2]], "neurons.0": [3, 5]})))
def test_command_reconstruct(home, content):
    options = ["--mask", home / "some.json", "--calib", home / "texts.txt", "--tokens", 100]
    _carried_out(home, content, "reconstruct", home / "bert", *options)


@example(content=with_value(COSTS.to_json(), "sites", "neurons.0", "4", new=math.inf))
@inputs(30, content=json_files(COSTS.to_json()))
def test_command_budget(home, content):
    options = ["--keep", 0.5, "--criterion", "magnitude", "--calib", home / "texts.txt", "--tokens", 100]
    _carried_out(home, content, "prune", home / "bert", *options, "--budget", home / "some.json")


def test_a_plain_run_is_as_large_as_it_says():
    assert sum(strategies.asked.values()) <= strategies.PLAIN
