"""Comparisons on the same examples: the statistics, their intervals, and the tables of who is ahead."""

import json
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import paired, standing
from benchmarks.metrics import metric
from benchmarks.paired import RESAMPLES, Gap, draws, resampled
from benchmarks.results import ResultFile, packed, unpacked


@pytest.fixture
def examples():
    generator = np.random.default_rng(0)
    x = np.round(generator.normal(size=120), 1)
    return np.stack([x, np.round(x + generator.normal(size=120), 1)], 1)


def repeated(values, weights):
    return np.repeat(values, weights.astype(int), axis=0)


def plain(number, values):
    """Without weights, by the metrics of the benchmarks or by hand."""
    if number in ("accuracy", "f1"):
        return values[:, 0].mean()
    if number == "perplexity":
        return math.exp(values[:, 0].sum() / values[:, 1].sum())
    if number == "acc":
        return np.mean([values[values[:, 0] == group, 1].mean() for group in np.unique(values[:, 0])])
    return metric(number).compute(predictions=values[:, 0].tolist(), references=values[:, 1].tolist())[number]


@pytest.mark.parametrize("number", paired.STATISTICS)
def test_a_resample_is_the_number_of_the_examples_it_has(number, examples):
    """Weights stand for repeated examples."""
    values = {
        "perplexity": np.abs(examples) * [10, 1] + [1, 1],
        "matthews": (examples > 0).astype(float),
        "acc": np.stack([np.arange(120) % 3, examples[:, 0] > 0], 1).astype(float),
    }.get(number, examples)
    found = resampled(number, [values])
    assert found.shape == (1 + RESAMPLES,)
    assert found[0] == pytest.approx(plain(number, values))
    for resample in (1, 2, RESAMPLES):
        assert found[resample] == pytest.approx(plain(number, repeated(values, draws(120)[resample])))


def test_intervals_are_those_of_scipy(examples):
    """The same up to chance: the percentile bootstrap of a paired difference."""
    other = examples[:, ::-1] * [1, 0.5]
    gap = Gap.between(resampled("spearman", [examples]), resampled("spearman", [other * [1, -1]]))
    rho = lambda a, b, axis=-1: scipy.stats.spearmanr(a, b).statistic  # noqa: E731
    reference = scipy.stats.bootstrap(
        (*examples.T, *(other * [1, -1]).T), lambda a, b, c, d: rho(a, b) - rho(c, d),
        paired=True, vectorized=False, method="percentile", n_resamples=1000, rng=0,
    ).confidence_interval  # fmt: skip
    width = reference.high - reference.low
    assert gap.low == pytest.approx(reference.low, abs=0.15 * width)
    assert gap.high == pytest.approx(reference.high, abs=0.15 * width)


def test_a_difference_that_each_score_hides_shows_when_paired():
    """Two rules that agree on all examples but a few, of which one has all."""
    generator = np.random.default_rng(1)
    one = (generator.random(1000) < 0.8).astype(float)[:, None]
    other = one.copy()
    other[np.flatnonzero(one)[:12]] = 0
    gap = Gap.between(resampled("accuracy", [one]), resampled("accuracy", [other]))
    alone = np.std(resampled("accuracy", [one]))
    assert gap.difference == pytest.approx(0.012)
    assert gap.difference < 1.96 * alone
    assert gap.verdict(more=True) == "ahead"
    assert gap.verdict(more=False) == "behind"
    assert Gap.between(resampled("accuracy", [one]), resampled("accuracy", [one])).verdict(more=True) == "level"


def test_about_one_in_twenty_is_not_level_where_nothing_differs():
    generator = np.random.default_rng(2)
    verdicts = []
    for _ in range(300):
        one, other = (generator.random((2, 200, 1)) < 0.7).astype(float)
        verdicts.append(Gap.between(resampled("accuracy", [one]), resampled("accuracy", [other])).verdict(more=True))
    assert verdicts.count("ahead") + verdicts.count("behind") == pytest.approx(15, abs=12)


def test_several_samples_of_the_texts_count_with_their_mean(examples):
    both = resampled("spearman", [examples, examples[:, ::-1] ** 3])
    np.testing.assert_allclose(both, (resampled("spearman", [examples]) + resampled("spearman", [examples[:, ::-1] ** 3])) / 2)


@given(
    st.lists(
        st.lists(st.one_of(st.integers(-5, 70_000), st.floats(width=64), st.booleans()), min_size=2, max_size=2), min_size=1
    )
)
@settings(max_examples=60)
def test_what_is_packed_comes_out(rows):
    values = np.array(rows, dtype=float)
    entry = json.loads(json.dumps(packed(values)))
    np.testing.assert_array_equal(unpacked(entry).astype(float), values)


def test_packing_takes_the_smallest_type():
    kinds = {"uint8": [0, 1], "uint16": [300], "float32": [0.5, -1], "float64": [0.1]}
    for kind, values in kinds.items():
        assert packed(np.array(values, dtype=float)[:, None])["type"] == kind


# Who is ahead


@pytest.fixture
def grid(tmp_path):
    """Two complete cells and one that lacks a rule, of accuracies."""
    generator = np.random.default_rng(3)
    file = ResultFile(tmp_path / "grid" / "glue-sst2-m.jsonl")
    base = (generator.random(400) < 0.8).astype(float)
    for keep, good in ((0.5, "ours"), (0.3, "liar"), (0.7, "ours")):
        for rule in ("liar", "grail", "ours"):
            if (keep, rule) == (0.7, "grail"):
                continue
            for seed in (0, 1):
                right = base.copy()
                right[np.flatnonzero(base)[: 0 if rule == good else 40 if rule == "grail" else 20]] = 0
                cell = {
                    "task": "glue-sst2",
                    "model": "m",
                    "criterion": "reconstruction",
                    "keep": keep,
                    "source": "own",
                    "tokens": 9,
                }
                file.append({**cell, "rule": rule, "seed": seed, "per_example": packed(right[:, None])})
    file.append({"task": "glue-sst2", "model": "m", "rule": "dense", "accuracy": 0.8, "per_example": packed(base[:, None])})
    return tmp_path


def test_only_complete_cells_count_and_both_sides_are_seen(grid):
    rules = ("liar", "grail", "ours")
    frame = standing.compared(rules, grid / "standing.jsonl", grid / "grid")
    assert len(frame) == 2 * 3 * 2
    assert set(frame["keep"]) == {0.5, 0.3}
    verdict = {(row.keep, row.one, row.other): row.verdict for row in frame.itertuples()}
    assert verdict[0.5, "ours", "liar"] == "ahead"
    assert verdict[0.5, "liar", "ours"] == "behind"
    assert verdict[0.3, "ours", "liar"] == "behind"
    assert (frame["low"] <= frame["difference"]).all()
    assert (frame["difference"] <= frame["high"]).all()
    # Computed once: the file serves the next time, and a changed answer is compared anew.
    lines = (grid / "standing.jsonl").read_text().splitlines()
    assert len(lines) == 2
    standing.compared(rules, grid / "standing.jsonl", grid / "grid")
    assert (grid / "standing.jsonl").read_text().splitlines() == lines
    path = grid / "grid" / "glue-sst2-m.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[0]["per_example"] = packed(np.zeros((400, 1)))
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    standing.compared(rules, grid / "standing.jsonl", grid / "grid")
    assert len((grid / "standing.jsonl").read_text().splitlines()) == 3


def test_tables_of_who_is_ahead(grid):
    frame = standing.compared(("liar", "grail", "ours"), grid / "standing.jsonl", grid / "grid")
    rows = {
        line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:]
        for line in standing.table(frame, "ours").split("\n")[2:]
    }
    assert rows["LIAR"] == ["2", "1", "0", "1", "3", "0", "1"]
    assert rows["**ours**"] == ["2", "", "", "", "3", "0", "1"]
    assert standing.by_task(frame, "ours").split("\n")[2] == "| glue-sst2 | own | 2 | 1 | 0 | 1 | 3 | 0 | 1 |"
    (lost,) = standing.behind(frame, "ours").split("\n")[2:]
    assert lost.startswith("| glue-sst2 | own | 30% | 9 | LIAR | -0.0500 | -0.0")
