"""The benchmarks that repeat studies of gradient reconstruction: their plans, runs on a small real model, and tables."""

import copy
from dataclasses import asdict, replace

import numpy
import pytest
import torch

from benchmarks import free_lunch, refinement, rethinking, starts, steps
from benchmarks.refinement import Run, Scale, Study, by_seed, entries, run_plan
from benchmarks.results import ResultFile

SCALE = Scale("tinystories", length=16, tokens=128, evaluated=64, seeds=(0,))
STUDIES = (rethinking, free_lunch, starts)


@pytest.fixture
def study(stories_folder, write):
    """A real model on a few stories."""
    stories = [
        f"Once upon a time there was a cat number {number}. It ran to its mom and dad, all {number} of them."
        for number in range(40)
    ]
    write("tinystories/train_part.jsonl.gz", [{"text": story} for story in stories[:30]])
    write("tinystories/holdout_part.jsonl.gz", [{"text": story} for story in stories[30:]])
    data = write("wikitext2/raw_test.txt.gz", [f" The {number} th house is in a town ." for number in range(30)])
    return Study(str(stories_folder), data, SCALE)


RUNS = [
    Run("units", "magnitude", 0.8),
    Run("units", "magnitude", 0.8, granularity="block", epochs=1),
    Run("units", "magnitude", 0.8, "closed form"),
    Run("weights", "wanda", "2:4", granularity=2, epochs=1, select=True),
]


def test_runs_are_scored_once(study, tmp_path, monkeypatch):
    file = ResultFile(tmp_path / "runs.jsonl")
    records = run_plan(study, "tiny", RUNS, file)
    numbers = {"seconds", "grown_mb", "steps", "calibration_error", "unseen_error", *rethinking.NUMBERS}
    for run, record in zip(RUNS, records, strict=True):
        assert record.keys() == entries(run, SCALE, "tiny").keys() | numbers | {"environment"}
        assert 0 < record["unseen_error"] < 2
        # Eight sequences in one step, or six of them (two are held out), by window.
        windows = {None: 0, "block": 5, 2: 4}[run.granularity]
        assert record["steps"] == windows
    monkeypatch.setattr(Study, "measure", lambda *_: pytest.fail("run again"))
    assert run_plan(study, "tiny", RUNS, ResultFile(file.path)) == records


def test_the_dense_model_has_no_error(study):
    model = copy.deepcopy(study.dense)
    errors = study.errors(model, study.calibration(0))
    assert errors == {"calibration_error": 0.0, "unseen_error": 0.0}


def test_only_the_first_blocks_are_pruned_and_trained(study):
    study.scale = replace(SCALE, blocks=2)
    run = Run("weights", "magnitude", 0.5, granularity="block", epochs=1)
    model = study.pruned(run)
    study._train(model, run, study.calibration(0))
    for number, (block, dense) in enumerate(zip(model.model.layers, study.dense.model.layers, strict=True)):
        pairs = zip(block.parameters(), dense.parameters(), strict=True)
        assert all(torch.equal(*pair) for pair in pairs) == (number >= 2), number
    assert entries(run, study.scale, "tiny")["blocks"] == 2


def test_written_texts_are_added_for_training_alone(study):
    own, both = study.calibration(0), study.calibration(0, "own + self")
    assert [each is other for each, other in zip(own, both, strict=False)] == [True] * len(own)
    count = lambda batches: sum(int(batch["attention_mask"].sum()) for batch in batches)  # noqa: E731
    assert count(both) == pytest.approx(2 * count(own), rel=0.2)
    assert count(study.calibration(0, "own + own")) == pytest.approx(2 * count(own), rel=0.2)


@pytest.mark.parametrize("module", STUDIES)
def test_plans_have_every_run_once(module):
    for name, scale in module.SCALES.items():
        runs = list(by_seed(scale, module.plan(name)))
        assert len(runs) == len(set(runs)) > 4
        for run in runs:
            if run.granularity is not None:
                run.options().check()


def record(run, **numbers):
    zero = dict.fromkeys(("seconds", "grown_mb", "steps", "calibration_error", "unseen_error", *rethinking.NUMBERS), 0.0)
    return {**entries(run, SCALE, "tiny"), **zero, **numbers}


def test_the_table_of_methods(tmp_path, monkeypatch):
    monkeypatch.setattr(rethinking, "FILE", tmp_path / "runs.jsonl")
    assert rethinking.table().count("\n") == 1, "headings alone"
    assert rethinking.draw().axes
    file = ResultFile(rethinking.FILE)
    base = replace(rethinking.PRUNED, granularity="block")
    for seed, error in enumerate((0.1, 0.3)):
        file.append(record(replace(base, seed=seed), unseen_error=error))
    file.append(record(replace(base, propagation="pruned"), unseen_error=0.5))
    rows = [line.split(" | ") for line in rethinking.table().splitlines()[2:]]
    assert [row[2:4] for row in rows] == [["BR", "1"], ["BR+GP", "2"]]
    assert rows[1][5] == "0.2000 ± 0.1000"
    assert len(rethinking.draw().axes[0].lines) == 1, "of what was run alone"


def test_the_tables_of_granularities(tmp_path, monkeypatch):
    monkeypatch.setattr(free_lunch, "FILE", tmp_path / "runs.jsonl")
    file = ResultFile(free_lunch.FILE)
    base = Run("units", "magnitude", 0.8)
    for run, number in ((base, 9.0), (replace(base, start="closed form"), 8.0), (replace(base, granularity="block"), 7.0)):
        file.append(record(run, perplexity_tinystories=number, seconds=number))
    file.append(record(Run("weights", "sparsegpt", "2:4"), perplexity_tinystories=6.0))
    rows = [line.strip("| ").split(" | ") for line in free_lunch.table().splitlines()]
    table = [dict(zip(rows[0], row, strict=False)) for row in rows[2:]]
    assert (table[0]["nothing"], table[0]["closed form"], table[0]["block"]) == ("9.00", "8.00", "7.00")
    assert (table[1]["kept"], table[1]["its own update"]) == ("2:4 of the weights", "6.00")
    assert "| tiny | units | block | 7.0 | 0.0 |" in free_lunch.costs()
    assert free_lunch.draw().axes


@pytest.mark.parametrize(
    ("curve", "error", "epochs"),
    [
        ([(0, 4.0), (1, 2.0), (3, 1.0)], 3.0, 0.5),
        ([(0, 4.0), (1, 2.0), (3, 1.0)], 1.5, 2.0),
        ([(0, 4.0), (1, 2.0)], 5.0, 0.0),
        ([(0, 4.0), (1, 2.0)], 1.0, numpy.inf),
    ],
)
def test_epochs_to_an_error(curve, error, epochs):
    assert starts.epochs_to(numpy.array(curve), error) == epochs


def test_the_tables_of_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(starts, "FILE", tmp_path / "runs.jsonl")
    file = ResultFile(starts.FILE)
    scores = {"stories260K": 0}
    assert scores.keys() <= starts.SCORES.keys()
    for run in starts.plan("stories260K"):
        error = (4.0 if run.start == "mask" else 2.0) - (0.1 * run.epochs if run.granularity else 0)
        file.append({**record(run, unseen_error=error), "model": "stories260K"})
    assert "| stories260K | 50% | 3.0000 | 10 | 0.0 |" in starts.saved()
    assert "0: 4.0000, 1: 3.9000, 3: 3.7000, 10: 3.0000" in starts.table()


def test_ways_to_prune(study, tmp_path, monkeypatch):
    """In steps or not, cut here or elsewhere: all are scored, and the last two are as good."""
    monkeypatch.setattr(steps, "FILE", tmp_path / "runs.jsonl")
    file = ResultFile(steps.FILE)
    for way in steps.WAYS:
        found = steps.measure(study, way, 0.6, 0)
        file.append({"model": "stories260K", "tokens": 128, "seed": 0, "keep": 0.6, "way": way, **found})
    errors = {each["way"]: each["unseen_error"] for each in file.records}
    assert errors["1 step, cut elsewhere"] == pytest.approx(errors["1 step"], rel=0.02)
    assert [line.split(" | ")[2] for line in steps.table().splitlines()[2:]] == list(steps.WAYS)


def test_runs_are_told_apart_by_all_that_they_are():
    assert asdict(Run("units", "magnitude", 0.8)).keys() <= entries(Run("units", "magnitude", 0.8), SCALE, "tiny").keys()
    assert refinement.DOMAINS.keys() == {"tinystories", "wikitext"}
