"""The core of the benchmarks: metrics, tasks on tiny models, cells, the ladder's shared masks and its going on after a kill."""

import gzip
import importlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from liar.testing import tiny_model

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    """Imports a script or package of the benchmarks by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module


@pytest.fixture
def write(tmp_path):
    def write(name, rows):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        return tmp_path / "data"

    return write


def words(generator, low, high):
    return " ".join(f"w{number}" for number in generator.integers(0, 80, generator.integers(low, high)))


def pairs(count, seed):
    generator = np.random.default_rng(seed)
    return [
        {"sentence1": words(generator, 2, 20), "sentence2": words(generator, 2, 20), "label": int(generator.integers(0, 2))}
        for _ in range(count)
    ]


@pytest.fixture
def mrpc(write):
    write("c4/sample.jsonl.gz", [{"text": f"It is {number}. Is it? It\n is v1.{number}!"} for number in range(9)])
    write("mrpc/train.jsonl.gz", pairs(90, 0))
    return write("mrpc/dev.jsonl.gz", pairs(70, 1))


@pytest.fixture
def classifier(tmp_path, tokenizer):
    """Folder of a tiny classifier."""
    model = tiny_model("bert", head="sequence-classification", num_labels=2, seed=3)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_metrics_against_scipy(benchmark):
    metric = benchmark("metrics").metric
    generator = np.random.default_rng(0)
    said, labels = generator.normal(size=20), generator.normal(size=20)
    spearman = metric("spearman").compute(predictions=list(said), references=list(labels))["spearman"]
    assert spearman == pytest.approx(np.corrcoef(scipy.stats.rankdata(said), scipy.stats.rankdata(labels))[0, 1])
    assert metric("accuracy").compute(predictions=[0, 1, 1, 2], references=[0, 1, 0, 1])["accuracy"] == 0.5
    perplexity = metric("perplexity").compute(predictions=[3 * math.log(2), math.log(32)], references=[3, 1])["perplexity"]
    assert perplexity == pytest.approx(4)


def test_divergence_from_the_dense_predictions(benchmark):
    metric = benchmark("metrics").metric("agreement_kl")
    logits = np.random.default_rng(1).normal(size=(2, 50, 4)).astype("float32")
    found = metric.compute(predictions=logits[0], references=logits[1])
    model, dense = (scipy.special.softmax(each.astype("float64"), axis=1) for each in logits)
    assert found["kl"] == pytest.approx(
        np.mean([scipy.stats.entropy(d, m) for d, m in zip(dense, model, strict=True)]), rel=1e-5
    )
    assert found["agreement"] == pytest.approx(np.mean(dense.argmax(1) == model.argmax(1)))
    assert 0 < found["agreement"] < 1
    assert metric.compute(predictions=logits[0] + 5, references=logits[0]) == {"kl": pytest.approx(0, abs=1e-6), "agreement": 1}


def test_classifiers_are_asked_example_by_example(benchmark, mrpc, classifier):
    """Batches are sorted and padded; answers come in the order of the file, pairs as pairs."""
    task = benchmark("tasks").TASKS["glue-mrpc"]
    model, tokenizer = task.load(classifier)
    logits = task.predict(model, tokenizer, mrpc)["logits"]
    dev = pairs(70, 1)
    with torch.no_grad():
        alone = [model(**tokenizer(row["sentence1"], row["sentence2"], return_tensors="pt")).logits[0] for row in dev]
    torch.testing.assert_close(logits, torch.stack(alone), rtol=1e-4, atol=1e-5)
    right = np.mean([int(one.argmax()) == row["label"] for one, row in zip(alone, dev, strict=True)])
    scored = task.score({"logits": logits}, {"logits": logits.flip(1)}, mrpc)
    assert scored["accuracy"] == pytest.approx(right)
    assert (scored["agreement"], scored["examples"]) == (0, 70)
    assert scored["kl"] > 0


def test_regression_is_compared_by_squares(benchmark, write):
    data = write("stsb/dev.jsonl.gz", [{**row, "label": number / 10} for number, row in enumerate(pairs(30, 2))])
    task = benchmark("tasks").TASKS["glue-stsb"]
    logits = torch.arange(30.0)[:, None]
    assert task.score({"logits": logits}, {"logits": logits + 2}, data) == {
        "spearman": pytest.approx(1),
        "squared_difference": pytest.approx(4),
        "examples": 30,
    }


def test_embeddings_of_different_sentences_only(benchmark, write):
    rows = [
        {"sentence1": "a text", "sentence2": "another one", "label": 1.0},
        {"sentence1": "another one", "sentence2": "a text", "label": 1.0},
        {"sentence1": "a text", "sentence2": "a text", "label": 5.0},
    ]
    data = write("stsb/dev.jsonl.gz", rows)
    task = benchmark("tasks").TASKS["stsb"]
    texts, numbers = benchmark("tasks.encoder").sentences(data)
    assert texts == ["a text", "another one"]
    assert numbers.tolist() == [[0, 1], [1, 0], [0, 0]]
    dense, turned = torch.eye(2), torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    found = task.score({"embeddings": turned}, {"embeddings": dense}, data)
    assert found == {"spearman": pytest.approx(1), "cosine": pytest.approx(0.8), "examples": 3}


def test_questions_find_their_paragraphs(benchmark, write, tokenizer):
    rows = [
        {"title": title, "context": context, "question": question}
        for title, context, question in [
            ("kept", "w1 w2 w3", "w4"),
            ("asked", "w5 w6 w7", "w5"),
            ("asked", "w8 w9", "w8"),
            ("asked", "w5 w6 w7", "w6"),
        ]
    ]
    data = write("squad_v1.1/dev.jsonl.gz", rows)
    (data / "squad_v1.1/heldout_titles.json").write_text('["asked"]')
    task = benchmark("tasks").TASKS["passages"]
    assert sorted(task.texts(data, "own", 0)) == ["w1 w2 w3", "w4"]
    said = task.predict(tiny_model("bert").eval(), tokenizer, data)
    assert {name: list(value.shape) for name, value in said.items()} == {"paragraphs": [2, 32], "questions": [3, 32]}
    paragraphs, questions = torch.eye(2), torch.tensor([[0.6, 0.8], [0.0, 1.0], [1.0, 0.0]])
    found = task.score(
        {"paragraphs": paragraphs, "questions": questions}, {"paragraphs": paragraphs, "questions": questions.flip(1)}, data
    )
    assert found == {
        "accuracy": pytest.approx(2 / 3),
        "paragraphs cosine": pytest.approx(1),
        "questions cosine": pytest.approx(0.96 / 3),
        "examples": 3,
    }


def test_perplexity_of_stories(benchmark, write, plain_tokenizer):
    generator = np.random.default_rng(5)
    stories = [words(generator, 5, 40) for _ in range(6)]
    data = write("tinystories/holdout_part.jsonl.gz", [{"text": story} for story in stories])
    task, model = benchmark("tasks").TASKS["tinystories"], tiny_model("llama", head="causal-lm")
    said = task.predict(model, plain_tokenizer, data)
    scored = task.score(said, said, data)
    losses, count = 0.0, 0
    with torch.no_grad():
        for story in stories:
            ids = plain_tokenizer(story, return_tensors="pt")["input_ids"]
            losses += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    assert scored["perplexity"] == pytest.approx(math.exp(losses / count), rel=1e-5)
    assert 0 < scored["perplexity_error"] < scored["perplexity"]
    assert scored["compared_tokens"] == count
    assert (scored["kl"], scored["agreement"]) == (pytest.approx(0, abs=1e-6), 1)


def test_calibration_texts_follow_source_and_seed(benchmark, mrpc):
    task = benchmark("tasks").TASKS["glue-mrpc"]
    own = task.texts(mrpc, "own", 0)
    assert own == task.texts(mrpc, "own", 0) != task.texts(mrpc, "own", 1)
    assert sorted(own) == sorted((row["sentence1"], row["sentence2"]) for row in pairs(90, 0))
    assert len(task.texts(mrpc, "c4", 0)) == 9
    assert task.texts(mrpc, "c4-whole", 0) == task.texts(mrpc, "c4", 0)
    sentences = task.texts(mrpc, "c4-sentences", 0)
    assert len(sentences) == 36
    assert {"It is 3.", "Is it?", "It", "is v1.3!"} <= {text.strip() for text in sentences}


def test_files_carry_all_coordinates_and_seeds_come_last(benchmark):
    cells = benchmark("cells")
    settings = list(
        cells.settings("stsb", "default", "wanda", seeds=2, sources=["own", "c4"], keeps=[0.5, 0.7], tokens=[10, 20])
    )
    names = [cells.Cell(setting, rule).path(Path()).name for setting in settings for rule in ("bias", "liar")]
    assert len(set(names)) == len(names) == 32
    assert names[0] == "stsb-default-wanda-keep0.5-tokens10-own-bias-seed0.json"
    assert [setting.seed for setting in settings] == [0] * 8 + [1] * 8
    assert cells.Cell(settings[0], "bias").coordinates()["rule"] == "bias"


def test_results_are_written_whole_or_not_at_all(benchmark, tmp_path):
    kept = benchmark("results").kept
    path = tmp_path / "deep" / "run.json"
    with pytest.raises(KeyboardInterrupt):
        kept(path, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert not path.exists()
    assert kept(path, lambda: {"value": 1})["value"] == 1
    assert kept(path, lambda: {"value": 2})["value"] == 1
    assert {"environment", "value"} == set(json.loads(path.read_text()))
    assert [file.name for file in path.parent.iterdir()] == ["run.json"]


@pytest.fixture
def climb(benchmark, mrpc, classifier, tmp_path, monkeypatch):
    """Runs a small ladder; returns its runs and, per rule that ran, the mask and the batches it was given."""
    ladder, bench_module = benchmark("ladder"), benchmark("bench")
    given = []

    def spy(name, rule):
        def apply(model, mask, calib):
            given.append((name, mask, calib))
            rule(model, mask, calib)

        return apply

    monkeypatch.setattr(bench_module, "RULES", {name: spy(name, rule) for name, rule in bench_module.RULES.items()})

    def climb(rules, seeds=2, criterion="fluctuation"):
        given.clear()
        bench = ladder.Bench(ladder.TASKS["glue-mrpc"], classifier, mrpc)
        settings = list(
            ladder.settings("glue-mrpc", "model", criterion, seeds=seeds, sources=["own"], keeps=[0.6], tokens=[300, 600])
        )
        return ladder.climb(bench, settings, rules, tmp_path / "results"), given

    return climb


def test_rules_share_mask_and_tokens(climb):
    runs, given = climb(["mask_only", "liar", "ours"])
    assert len(runs) == len(given) == 12
    for first in range(0, 12, 3):
        group = given[first : first + 3]
        assert [name for name, _, _ in group] == ["mask_only", "liar", "ours"]
        assert all(mask is group[0][1] and calib is group[0][2] for _, mask, calib in group)
    assert [run["seed"] for run in runs] == [0] * 6 + [1] * 6
    for run in runs:
        assert run["got_tokens"] == run["tokens"]
        assert 0.5 < run["got"] <= 0.6
        assert run["seconds"] > 0
        assert {"accuracy", "kl", "agreement", "environment", "source", "rule", "criterion"} <= set(run)
    assert runs[0]["kl"] > 0


def test_a_killed_ladder_goes_on(climb, tmp_path):
    before, _ = climb(["mask_only", "liar"])
    lost = sorted((tmp_path / "results").iterdir())[2]
    wanted = json.loads(lost.read_text())
    lost.unlink()
    after, given = climb(["mask_only", "liar"])
    assert [name for name, _, _ in given] == [wanted["rule"]]
    timeless = lambda runs: [{key: value for key, value in run.items() if key != "seconds"} for run in runs]  # noqa: E731
    assert timeless(after) == timeless(before)
    assert climb(["mask_only", "liar"])[1] == []


@pytest.mark.parametrize("criterion", ["kwon", "kprune", "fisher", "random"])
def test_a_ladder_takes_any_selection(climb, tmp_path, criterion):
    runs, given = climb(["mask_only", "liar"], seeds=1, criterion=criterion)
    assert len(runs) == len(given) == 4
    assert all(given[i][1] is given[i + 1][1] for i in (0, 2))
    for run in runs:
        assert run["criterion"] == criterion
        assert 0.5 < run["got"] <= 0.6
        name = f"glue-mrpc-model-{criterion}-keep0.6-tokens{run['tokens']}-own-{run['rule']}-seed0.json"
        assert (tmp_path / "results" / name).is_file()


def runs_of(values):
    """{(rule, keep): accuracies by seed} as contents of result files."""
    shared = {"task": "t", "source": "own", "tokens": 100}
    return [
        {**shared, "rule": rule, "keep": keep, "seed": seed, "accuracy": value}
        for (rule, keep), found in values.items()
        for seed, value in enumerate(found)
    ]


def test_tables_show_mean_and_standard_error(benchmark):
    summary = benchmark("summary")
    runs = runs_of({("bias", 0.5): [0.1, 0.2, 0.6], ("liar", 0.5): [0.4, 0.4, 0.4], ("bias", 0.7): [0.9]})
    (more,) = summary.tables(runs, {"accuracy": 0.95}, {"accuracy": True})
    (less,) = summary.tables(runs, {}, {"accuracy": False})
    cells = lambda table: [list(column.cells) for column in table.columns]  # noqa: E731
    error = np.std([0.1, 0.2, 0.6], ddof=1) / 3**0.5
    bias, liar = [f"0.3000 ± {error:.4f}", "[bold]0.9000[/bold]"], ["[bold]0.4000 ± 0.0000[/bold]", ""]
    assert cells(more)[3:] == [["3", "1"], bias, liar]
    assert cells(less)[4][0] == f"[bold]0.3000 ± {error:.4f}[/bold]"
    assert "dense 0.9500" in more.title
    assert "dense" not in less.title


def test_the_figure_shows_every_rule(benchmark, tmp_path):
    runs = runs_of({("bias", 0.5): [0.1, 0.2], ("liar", 0.5): [0.4, 0.4], ("bias", 0.7): [0.9], ("liar", 0.7): [0.8]})
    benchmark("figures").draw(runs, {"accuracy": 0.95}, "accuracy", tmp_path / "deep" / "figure.svg")
    drawn = (tmp_path / "deep" / "figure.svg").read_text()
    assert {"bias", "liar", "dense", "accuracy"} <= set(re.findall(r"<!-- (\w+) -->", drawn))


@pytest.mark.parametrize("number", ["accuracy", "spearman"])
def test_what_chance_does_to_a_score(number, benchmark):
    """The formulas against resampling the examples."""
    generator = np.random.default_rng(0)
    labels = generator.normal(size=400)
    said = labels + 0.6 * generator.normal(size=400)
    if number == "accuracy":
        labels, said = labels > 0, said > 0

    def score(said, labels):
        return np.mean(said == labels) if number == "accuracy" else scipy.stats.spearmanr(said, labels).statistic

    resampled = scipy.stats.bootstrap(
        (said, labels), score, paired=True, vectorized=False, n_resamples=800, method="percentile", rng=generator
    )
    error = benchmark("summary").CHANCE[number](score(said, labels), 400)
    assert error == pytest.approx(resampled.standard_error, rel=0.15)


def test_what_chance_does_to_perplexity(benchmark):
    """The formula against resampling the texts, short ones and long ones."""
    generator = np.random.default_rng(1)
    tokens = generator.integers(20, 400, size=300)
    losses = tokens * generator.normal(2, 0.4, size=300) + generator.normal(0, 5, size=300)

    def score(losses, tokens):
        return np.exp(losses.sum() / tokens.sum())

    resampled = scipy.stats.bootstrap(
        (losses, tokens), score, paired=True, vectorized=False, n_resamples=2000, method="percentile", rng=generator
    )
    found = benchmark("metrics").metric("perplexity").compute(predictions=losses.tolist(), references=tokens.tolist())
    assert found["perplexity"] == pytest.approx(score(losses, tokens))
    assert found["perplexity_error"] == pytest.approx(resampled.standard_error, rel=0.1)
    # A run without an error of its own has that of the dense model, in per cent.
    assert benchmark("summary").chance("perplexity", 10.0, {"perplexity": 4.0, "perplexity_error": 0.1}) == pytest.approx(0.25)


def test_chance_stands_beside_the_dense_score(publish, tmp_path):
    folder = files_of(tmp_path / "results", {("ours", 0.5, 16_000, "own", 0): 0.7, ("liar", 0.5, 16_000, "own", 0): 0.6})
    (file,) = folder.glob("*-dense.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "examples": 475}))
    rows = body(publish.glue())
    assert [row[4] for row in rows] == ["0.950 ± 0.010", "0.000", "1.000"]


def files_of(folder, values, **coordinates):
    """{(rule, keep, tokens, source, seed): accuracy} as result files of a task, and those of its dense model."""
    shared = {"task": "glue-sst2", "model": "m", "criterion": "fluctuation", **coordinates}
    folder.mkdir(exist_ok=True)
    dense = {"accuracy": 0.95, "kl": 0.0, "agreement": 1.0}
    (folder / f"{shared['task']}-{shared['model']}-dense.json").write_text(json.dumps(dense))
    for (rule, keep, tokens, source, seed), value in values.items():
        where = {"rule": rule, "keep": keep, "tokens": tokens, "source": source, "seed": seed}
        numbers = {"accuracy": value, "kl": 1 - value, "agreement": value, "seconds": 10 * value + seed}
        name = "-".join(map(str, (*shared.values(), *where.values())))
        (folder / f"{name}-seed{seed}.json").write_text(json.dumps({**shared, **where, **numbers}))
    return folder


@pytest.fixture
def publish(benchmark, monkeypatch, tmp_path):
    """The module, with the runs of the test's folder."""
    module, summary = benchmark("publish"), benchmark("summary")
    monkeypatch.setattr(module, "runs", lambda: summary.runs.__wrapped__(tmp_path / "results"))
    return module


def body(text):
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines()[2:]]


def test_pages_show_mean_and_standard_error_and_leave_out_what_is_missing(publish, tmp_path):
    values = {("bias", 0.5, 16000, "own", 0): 0.6, ("bias", 0.5, 16000, "own", 1): 0.8, ("ours", 0.5, 16000, "own", 1): 0.9}
    values |= {("ours", 0.5, 16000, "own", 0): 0.9, ("liar", 0.5, 16000, "own", 0): 0.5, ("liar", 0.5, 16000, "own", 1): 0.5}
    values |= {("ours", 0.5, 16000, "own", 2): 0.1}  # the others have not had these texts
    files_of(tmp_path / "results", values | {("bias", 0.7, 16000, "own", 0): 0.8, ("liar", 0.7, 16000, "own", 0): 0.75})
    wanda = {("ours", 0.5, 16000, "own", 0): 0.1, ("liar", 0.5, 16000, "own", 0): 0.05, ("ours", 0.3, 16000, "own", 0): 0.2}
    files_of(tmp_path / "results", wanda, criterion="wanda")
    text = publish.glue()
    assert re.match(r"\| task \| kept \| number \| samples \| dense \| mask only \| .* \| \*\*ours\*\* \|\n", text)
    assert len(body(text)) == 6
    accuracy = body(text)[3]
    assert accuracy[:5] == ["glue-sst2", "50%", "accuracy ↑", "2", "0.950"]
    assert accuracy[6] == "0.700 ± 0.100"
    assert [cell for cell in accuracy[5:] if cell] == ["0.700 ± 0.100", "0.500 ± 0.000", "**0.900 ± 0.000**"]
    assert body(text)[0][5:9] == ["", "**0.800**", "", "0.750"]
    assert body(text)[4][2:7] == ["kl ↓", "2", "0.000", "", "0.300 ± 0.100"]
    # Where one rule alone was run there is nothing to compare.
    assert [[cell for cell in row[5:] if cell] for row in body(publish.glue("wanda"))][:1] == [["0.050", "**0.100**"]]
    assert len(body(publish.glue("wanda"))) == 3


def test_pages_compare_what_was_run_on_both_sides(publish, tmp_path):
    own = {("ours", keep, 16000, "own", seed): keep + seed / 10 for keep in (0.5, 0.7) for seed in (0, 1, 2)}
    trained = {("polish", 0.5, 16000, "own", seed): 0.9 for seed in (0, 2)}
    other = {("ours", 0.7, 16000, "c4-sentences", 0): 0.4, ("ours", 0.7, 1000, "own", 0): 0.3}
    files_of(tmp_path / "results", own | trained | other)
    assert body(publish.polish()) == [
        ["glue-sst2", "50%", "16,000", "accuracy ↑", "2", "0.950", "0.600 ± 0.100", "**0.900 ± 0.000**"],
        ["glue-sst2", "50%", "16,000", "kl ↓", "2", "0.000", "0.400 ± 0.100", "**0.100 ± 0.000**"],
        ["glue-sst2", "50%", "16,000", "seconds ↓", "2", "", "7.0", "10.0"],
    ]
    assert [row[1:5] for row in body(publish.other_texts())] == [
        ["70%", "16,000", source, number] for source in ("c4-sentences", "own") for number in ("accuracy ↑", "kl ↓")
    ]
    assert [row[3] for row in body(publish.other_tokens())] == ["1,000"]


def test_selections_are_compared_on_the_texts_that_most_have_had(publish, tmp_path):
    own = lambda *values: {("ours", keep, 16000, "own", seed): value for keep, seed, value in values}  # noqa: E731
    files_of(tmp_path / "results", own((0.5, 0, 0.6), (0.5, 1, 0.8), (0.7, 0, 0.9)), criterion="random")
    files_of(tmp_path / "results", own((0.5, 0, 0.65), (0.5, 2, 0.1)), criterion="kwon")
    files_of(tmp_path / "results", own((0.5, 0, 0.7), (0.5, 1, 0.9)), criterion="reconstruction")
    files_of(tmp_path / "results", {("liar", 0.7, 16000, "own", 0): 0.9}, criterion="wanda")
    text = publish.criteria()
    assert text.startswith("| task | kept | number | samples | dense | reconstruction | Kwon et al. | random |\n")
    # Sample 0 has three selections, sample 1 two, and sample 2 nothing to compare with; nor has the other share.
    shared = ["glue-sst2", "50%"]
    assert body(text) == [
        [*shared, "accuracy ↑", "1", "0.950", "**0.700**", "0.650", "0.600"],
        [*shared, "kl ↓", "1", "0.000", "**0.300**", "0.350", "0.400"],
    ]
    files_of(tmp_path / "results", own((0.5, 1, 0.55)), criterion="kwon")
    assert body(publish.criteria())[0] == [
        *shared,
        "accuracy ↑",
        "2",
        "0.950",
        "**0.800 ± 0.100**",
        "0.600 ± 0.050",
        "0.700 ± 0.100",
    ]


def test_standing_counts_cells_by_how_far_behind_the_default_is(publish, tmp_path):
    def cells(keep, ours, best, *, source="own", seeds=(0,)):
        return {(rule, keep, 16000, source, s): v for s in seeds for rule, v in (("ours", ours), ("liar", best), ("bias", 0.1))}

    best = cells(0.7, 0.8, 0.8) | cells(0.5, 0.8, 0.7)
    behind = cells(0.3, 0.8, 0.805) | cells(0.2, 0.8, 0.83)
    alone = {("ours", 0.1, 16000, "own", 0): 0.5, ("polish", 0.1, 16000, "own", 0): 0.9}
    # Within one standard error over the samples, of the two that are compared; others do not count.
    spread = cells(0.5, 0.6, 0.55, source="c4", seeds=(0, 1)) | {("liar", 0.5, 16000, "c4", 1): 0.75}
    wide = cells(0.3, 0.6, 0.66, source="c4", seeds=(0, 1)) | {("bias", 0.3, 16000, "c4", 1): 0.5}
    folder = files_of(tmp_path / "results", best | behind | alone | spread | wide)
    assert [row[:6] for row in body(publish.standing_of_rules())] == [
        [task, *row] for task in ("glue-sst2", "glue-*") for row in (["own", "4", "2", "0", "2"], ["c4", "2", "0", "1", "1"])
    ]
    (file,) = folder.glob("*-dense.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "examples": 475}))  # one standard error is 0.01 then
    assert body(publish.standing_of_rules())[0][:6] == ["glue-sst2", "own", "4", "2", "1", "1"]


def test_standing_on_average_is_of_relative_differences_to_the_next_rule(publish, tmp_path):
    def runs(keep, ours, liar, bias):
        return {(rule, keep, 16000, "own", 0): v for rule, v in (("ours", ours), ("liar", liar), ("bias", bias))}

    missing = {("ours", 0.3, 16000, "own", 0): 0.9, ("bias", 0.3, 16000, "own", 0): 0.1}
    files_of(tmp_path / "results", runs(0.7, 0.8, 0.4, 0.7) | runs(0.5, 0.6, 0.9, 0.1) | missing)
    gains = np.log([0.8 / 0.4, 0.6 / 0.9])
    expected = ["LIAR", f"{gains.mean():.1%} ± {gains.std(ddof=1) / math.sqrt(2):.1%}"]
    assert [row[6:] for row in body(publish.standing_of_rules())] == [expected, expected]


def test_standing_of_losses_is_by_the_least(publish, tmp_path):
    values = {("ours", 0.5, 16000, "own", 0): 0.6, ("liar", 0.5, 16000, "own", 0): 0.7}
    folder = files_of(tmp_path / "results", values, task="tinystories")
    for file in folder.glob("*.json"):
        found = json.loads(file.read_text())
        file.write_text(json.dumps(found | {"perplexity": 10 * found.get("accuracy", 0)}))
    assert body(publish.standing_of_rules()) == [["tinystories", "own", "1", "1", "0", "0", "LIAR", "15.4%"]]


# Tables of benchmarks that have results of their own, which are always there.
ELSEWHERE = ("speed", "latency", "elimination", "elimination time", "dropping")


def test_pages_without_a_run_have_headings_only(publish):
    of_the_ladder = {name: make for name, make in publish.TABLES.items() if name not in ELSEWHERE}
    assert all(body(make()) == [] for make in of_the_ladder.values())


def test_pages_tell_models_apart(publish, tmp_path):
    for model in ("small", "large"):
        files_of(tmp_path / "results", {("ours", 0.5, 1000, "own", 0): 0.4}, model=model)
    assert sorted(row[4] for row in body(publish.other_tokens())) == ["large", "small"]


def test_published_figures_show_every_rule(benchmark, publish, tmp_path):
    values = {(rule, keep, 16000, "own", 0): 2 + keep for rule in publish.CLOSED_FORM for keep in (0.5, 0.7)}
    files_of(tmp_path / "results", values)
    file = tmp_path / "deep" / "figure.svg"
    benchmark("figures").published({"glue-sst2": publish.part(place=0)}, "keep", publish.CLOSED_FORM, file)
    labels = benchmark("summary").LABELS
    assert {labels[rule] for rule in publish.CLOSED_FORM} | {"dense"} <= set(re.findall(r"<!-- (.+?) -->", file.read_text()))
