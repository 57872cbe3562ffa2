"""The core of the benchmarks: metrics, tasks on tiny models, results on disk, the grid's shared masks, tables and figures."""

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pytest
import scipy.special
import scipy.stats
import torch

import liar
from benchmarks import bench as bench_module
from benchmarks import (
    by_block,
    figures,
    fitted_weights,
    gpu,
    grid,
    growth,
    more_text,
    publish,
    results,
    run_keys,
    samples,
    speed,
    summary,
)
from benchmarks.data import read
from benchmarks.elimination import error, remaining
from benchmarks.metrics import metric
from benchmarks.selections import SAMPLE_LABELS
from benchmarks.tasks import TASKS
from benchmarks.tasks.encoder import sentences
from liar.selection import fisher
from liar.testing import tiny_batches, tiny_model


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


def test_metrics_against_scipy():
    generator = np.random.default_rng(0)
    predicted, labels = generator.normal(size=20), generator.normal(size=20)
    spearman = metric("spearman").compute(predictions=list(predicted), references=list(labels))["spearman"]
    assert spearman == pytest.approx(np.corrcoef(scipy.stats.rankdata(predicted), scipy.stats.rankdata(labels))[0, 1])
    assert metric("accuracy").compute(predictions=[0, 1, 1, 2], references=[0, 1, 0, 1])["accuracy"] == 0.5
    perplexity = metric("perplexity").compute(predictions=[3 * math.log(2), math.log(32)], references=[3, 1])["perplexity"]
    assert perplexity == pytest.approx(4)


def test_divergence_from_the_dense_predictions():
    agreement_kl = metric("agreement_kl")
    logits = np.random.default_rng(1).normal(size=(2, 50, 4)).astype("float32")
    result = agreement_kl.compute(predictions=logits[0], references=logits[1])
    model, dense = (scipy.special.softmax(each.astype("float64"), axis=1) for each in logits)
    assert result["kl"] == pytest.approx(
        np.mean([scipy.stats.entropy(d, m) for d, m in zip(dense, model, strict=True)]), rel=1e-5
    )
    assert result["agreement"] == pytest.approx(np.mean(dense.argmax(1) == model.argmax(1)))
    assert 0 < result["agreement"] < 1
    assert agreement_kl.compute(predictions=logits[0] + 5, references=logits[0]) == {
        "kl": pytest.approx(0, abs=1e-6),
        "agreement": 1,
    }


def test_classifiers_are_asked_example_by_example(mrpc, classifier):
    """Batches are sorted and padded; answers come in the order of the file, pairs as pairs."""
    task = TASKS["glue-mrpc"]
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


def test_regression_is_compared_by_squares(write):
    data = write("stsb/dev.jsonl.gz", [{**row, "label": number / 10} for number, row in enumerate(pairs(30, 2))])
    task = TASKS["glue-stsb"]
    logits = torch.arange(30.0)[:, None]
    assert task.score({"logits": logits}, {"logits": logits + 2}, data) == {
        "spearman": pytest.approx(1),
        "squared_difference": pytest.approx(4),
        "examples": 30,
    }


def test_embeddings_of_different_sentences_only(write):
    rows = [
        {"sentence1": "a text", "sentence2": "another one", "label": 1.0},
        {"sentence1": "another one", "sentence2": "a text", "label": 1.0},
        {"sentence1": "a text", "sentence2": "a text", "label": 5.0},
    ]
    data = write("stsb/dev.jsonl.gz", rows)
    task = TASKS["stsb"]
    texts, numbers = sentences(data)
    assert texts == ["a text", "another one"]
    assert numbers.tolist() == [[0, 1], [1, 0], [0, 0]]
    dense, turned = torch.eye(2), torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    result = task.score({"embeddings": turned}, {"embeddings": dense}, data)
    assert result == {"spearman": pytest.approx(1), "cosine": pytest.approx(0.8), "examples": 3}


def test_questions_find_their_paragraphs(write, tokenizer):
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
    task = TASKS["passages"]
    assert sorted(task.texts(data, "own", 0)) == ["w1 w2 w3", "w4"]
    predicted = task.predict(tiny_model("bert").eval(), tokenizer, data)
    assert {name: list(value.shape) for name, value in predicted.items()} == {"paragraphs": [2, 32], "questions": [3, 32]}
    paragraphs, questions = torch.eye(2), torch.tensor([[0.6, 0.8], [0.0, 1.0], [1.0, 0.0]])
    result = task.score(
        {"paragraphs": paragraphs, "questions": questions}, {"paragraphs": paragraphs, "questions": questions.flip(1)}, data
    )
    assert result == {
        "accuracy": pytest.approx(2 / 3),
        "paragraphs cosine": pytest.approx(1),
        "questions cosine": pytest.approx(0.96 / 3),
        "examples": 3,
    }


def test_perplexity_of_stories(write, plain_tokenizer):
    generator = np.random.default_rng(5)
    stories = [words(generator, 5, 40) for _ in range(6)]
    data = write("tinystories/holdout_part.jsonl.gz", [{"text": story} for story in stories])
    task, model = TASKS["tinystories"], tiny_model("llama", head="causal-lm")
    predicted = task.predict(model, plain_tokenizer, data)
    scored = task.score(predicted, predicted, data)
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


def test_calibration_texts_follow_source_and_seed(mrpc):
    task = TASKS["glue-mrpc"]
    own = task.texts(mrpc, "own", 0)
    assert own == task.texts(mrpc, "own", 0) != task.texts(mrpc, "own", 1)
    assert sorted(own) == sorted((row["sentence1"], row["sentence2"]) for row in pairs(90, 0))
    dev = read(mrpc, "mrpc/dev")
    assert sorted(task.texts(mrpc, "evaluated", 0)) == sorted(zip(dev["sentence1"], dev["sentence2"], strict=True))
    with pytest.raises(SystemExit, match="wikitext-512-first-16384 has no texts for --source evaluated"):
        TASKS["wikitext-512-first-16384"].texts(mrpc, "evaluated", 0)
    assert len(task.texts(mrpc, "c4", 0)) == 9
    assert task.texts(mrpc, "c4-whole", 0) == task.texts(mrpc, "c4", 0)
    sentences = task.texts(mrpc, "c4-sentences", 0)
    assert len(sentences) == 36
    assert {"It is 3.", "Is it?", "It", "is v1.3!"} <= {text.strip() for text in sentences}


def test_keys_tell_runs_apart_and_seeds_come_last():
    cells = run_keys.Cells("wanda", ("bias", "liar"), (0.5, 0.7), sources=("own", "c4"), tokens=(10, 20), seeds=range(2))
    groups = list(cells.groups("stsb", "default"))
    keys = [key.entries() for group in groups for key in group]
    assert len({json.dumps(key) for key in keys}) == len(keys) == 32
    assert keys[0] == {
        "task": "stsb",
        "model": "default",
        "criterion": "wanda",
        "seed": 0,
        "source": "own",
        "keep": 0.5,
        "tokens": 10,
        "rule": "bias",
    }
    assert [group[0].setting.seed for group in groups] == [0] * 8 + [1] * 8
    part = cells.only(keeps=[0.7, 0.3], rules=None, sources=["c4"])
    assert (part.keeps, part.rules, part.sources) == ((0.7,), ("bias", "liar"), ("c4",))
    assert not list(cells.only(rules=["ours"]).groups("stsb", "default"))


def test_an_interrupted_run_leaves_no_record(tmp_path):
    file = results.ResultFile(tmp_path / "deep" / "runs.jsonl")
    with pytest.raises(KeyboardInterrupt):
        file.get_or_run({"seed": 0}, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert not file.path.exists()
    assert file.get_or_run({"seed": 0}, lambda: {"value": 1})["value"] == 1
    assert file.get_or_run({"seed": 0}, lambda: {"value": 2})["value"] == 1
    assert file.get_or_run({"seed": 1}, lambda: {"value": 3})["value"] == 3
    first, second = file.path.read_text().splitlines()
    assert set(json.loads(first)) == {"environment", "seed", "value"}
    assert list(json.loads(second)) == sorted(json.loads(second))
    assert results.ResultFile(file.path).records == file.records == results.read_records(file.path)


def test_a_line_that_ends_in_half_a_character_is_ignored_too(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_bytes('{"seed":0}\n{"name":"é"}\n'.encode()[:-4])
    assert results.read_records(path) == [{"seed": 0}]


@pytest.mark.parametrize("half", ['{"seed":1,"val', '{"seed":1,"value":2}'])
def test_a_half_written_line_is_ignored_and_removed(tmp_path, half):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"seed":0,"value":1}\n' + half)
    file = results.ResultFile(path)
    assert file.records == [{"seed": 0, "value": 1}]
    assert path.read_text().endswith(half)
    file.append({"seed": 1, "value": 5})
    assert path.read_text() == '{"seed":0,"value":1}\n{"seed":1,"value":5}\n'


def test_only_the_first_line_was_begun(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"seed"')
    assert results.read_records(path) == []
    results.ResultFile(path).append({"seed": 0, "text": "é"})
    assert path.read_text(encoding="utf-8") == '{"seed":0,"text":"é"}\n'


def test_appended_lines_are_on_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(results.os, "fsync", lambda handle: synced.append((tmp_path / "runs.jsonl").read_text()))
    results.ResultFile(tmp_path / "runs.jsonl").append({"seed": 0})
    assert synced == ['{"seed":0}\n']


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path):
    (tmp_path / "runs.jsonl").write_text('{"seed":0}\n{"se\n{"seed":2}\n')
    with pytest.raises(json.JSONDecodeError):
        results.read_records(tmp_path / "runs.jsonl")


@pytest.fixture
def run_grid(mrpc, classifier, tmp_path, monkeypatch):
    """Runs a small grid; returns its records and, per rule that ran, the mask and the batches it was given."""
    given = []

    def spy(name, rule):
        def apply(model, mask, calib):
            given.append((name, mask, calib))
            rule(model, mask, calib)

        return apply

    monkeypatch.setattr(bench_module, "RULES", {name: spy(name, rule) for name, rule in bench_module.RULES.items()})

    def run(rules, seeds=2, criterion="fluctuation", until=math.inf):
        given.clear()
        bench = grid.Bench(TASKS["glue-mrpc"], classifier, mrpc)
        plan = [run_keys.Cells(criterion, tuple(rules), (0.6,), tokens=(300, 600), seeds=range(seeds))]
        return grid.run_grid(bench, "model", plan, results.ResultFile(tmp_path / "runs.jsonl"), until), given

    return run


def test_rules_share_mask_and_tokens(run_grid):
    runs, given = run_grid(["mask_only", "liar", "ours"])
    assert len(runs) == len(given) == 12
    for first in range(0, 12, 3):
        group = given[first : first + 3]
        assert [name for name, _, _ in group] == ["mask_only", "liar", "ours"]
        assert all(mask is group[0][1] and calib is group[0][2] for _, mask, calib in group)
    assert [run["seed"] for run in runs] == [0] * 6 + [1] * 6
    for run in runs:
        assert run["used_tokens"] == run["tokens"]
        assert 0.5 < run["achieved"] <= 0.6
        assert run["seconds"] > 0
        assert {"accuracy", "kl", "agreement", "environment", "source", "rule", "criterion"} <= set(run)
        assert "labels" not in run
    assert runs[0]["kl"] > 0


def test_a_grid_that_was_killed_continues(run_grid, tmp_path):
    path = tmp_path / "runs.jsonl"
    before, _ = run_grid(["mask_only", "liar"])
    lines = path.read_text().splitlines(keepends=True)
    lost = json.loads(lines.pop(2))
    path.write_text("".join(lines) + '{"task":"glue-mr')
    after, given = run_grid(["mask_only", "liar"])
    assert [name for name, _, _ in given] == [lost["rule"]]
    timeless = lambda runs: [{key: value for key, value in run.items() if key != "seconds"} for run in runs]  # noqa: E731
    assert timeless(after) == timeless(before)
    assert run_grid(["mask_only", "liar"])[1] == []
    assert len(results.read_records(path)) == len(before)


@pytest.mark.parametrize("criterion", ["kwon", "kprune", "fisher", "random"])
def test_a_grid_takes_any_selection(run_grid, tmp_path, criterion):
    runs, given = run_grid(["mask_only", "liar"], seeds=1, criterion=criterion)
    assert len(runs) == len(given) == 4
    assert all(given[i][1] is given[i + 1][1] for i in (0, 2))
    assert results.read_records(tmp_path / "runs.jsonl") == runs
    for run in runs:
        assert run["criterion"] == criterion
        assert 0.5 < run["achieved"] <= 0.6
        assert run.get("labels") == ("by sequence" if criterion in ("kwon", "fisher") else None)


def test_a_rule_is_not_added_to_a_mask_of_the_former_sampling(run_grid, tmp_path):
    path = tmp_path / "runs.jsonl"
    run_grid(["mask_only"], seeds=1, criterion="fisher")
    path.write_text(path.read_text().replace("by sequence", "by batch"))
    assert len(run_grid(["mask_only"], seeds=1, criterion="fisher")[0]) == 2
    with pytest.raises(SystemExit, match="labels: by batch"):
        run_grid(["mask_only", "liar"], seeds=1, criterion="fisher")


def test_a_rule_is_not_added_to_a_mask_that_another_device_selected(run_grid, tmp_path):
    path = tmp_path / "runs.jsonl"
    run_grid(["mask_only"], seeds=1)
    path.write_text(path.read_text().replace('"device":"cpu"', '"device":"cuda"'))
    assert len(run_grid(["mask_only"], seeds=1)[0]) == 2
    with pytest.raises(SystemExit, match="the device cuda, not on cpu"):
        run_grid(["mask_only", "liar"], seeds=1)


def test_a_type_of_weights_is_another_model(classifier, mrpc, tmp_path, monkeypatch):
    found = {}
    monkeypatch.setattr(grid, "run_grid", lambda bench, name, *_: found.update(bench=bench, name=name) or [])
    chosen = ["--task", "glue-mrpc", "--model", str(classifier), "--data-dir", str(mrpc), "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["grid", *chosen, "--keep", "0.5", "--dtype", "bfloat16"])
    grid.main()
    assert found["name"] == f"{Path(classifier).name}-bfloat16"
    assert {parameter.dtype for parameter in found["bench"].loaded[0].parameters()} == {torch.bfloat16}
    assert (tmp_path / f"glue-mrpc-{found['name']}.jsonl").exists()


@pytest.mark.parametrize("name", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(name, capsys):
    with pytest.raises(SystemExit):
        grid.parser("", ["stsb"]).parse_args(["--task", "stsb", "--device", name])
    assert f"torch cannot use '{name}' here" in capsys.readouterr().err


def test_rotary_frequencies_keep_their_type():
    task = replace(TASKS["tinystories"], load=lambda _: (tiny_model("llama", head="causal-lm"), None))
    model, _ = grid.Bench(task, None, None, dtype=torch.bfloat16).loaded
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for name, buffer in model.named_buffers() if "inv_freq" in name} == {torch.float32}


def runs_of(values):
    """{(rule, keep): accuracies by seed} as records."""
    shared = {"task": "t", "source": "own", "tokens": 100}
    return [
        {**shared, "rule": rule, "keep": keep, "seed": seed, "accuracy": value}
        for (rule, keep), result in values.items()
        for seed, value in enumerate(result)
    ]


def test_tables_show_mean_and_standard_error():
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


def test_the_figure_shows_every_rule(tmp_path):
    runs = runs_of({("bias", 0.5): [0.1, 0.2], ("liar", 0.5): [0.4, 0.4], ("bias", 0.7): [0.9], ("liar", 0.7): [0.8]})
    figures.save(figures.draw(runs, {"accuracy": 0.95}, "accuracy"), tmp_path / "deep" / "figure.svg")
    drawn = (tmp_path / "deep" / "figure.svg").read_text()
    assert {"bias", "liar", "dense", "accuracy"} <= set(re.findall(r"<!-- (\w+) -->", drawn))


@pytest.mark.parametrize("number", ["accuracy", "spearman"])
def test_what_chance_does_to_a_score(number):
    """The formulas against resampling the examples."""
    generator = np.random.default_rng(0)
    labels = generator.normal(size=400)
    predicted = labels + 0.6 * generator.normal(size=400)
    if number == "accuracy":
        labels, predicted = labels > 0, predicted > 0

    def score(predicted, labels):
        return np.mean(predicted == labels) if number == "accuracy" else scipy.stats.spearmanr(predicted, labels).statistic

    resampled = scipy.stats.bootstrap(
        (predicted, labels), score, paired=True, vectorized=False, n_resamples=800, method="percentile", rng=generator
    )
    error = summary.CHANCE[number](score(predicted, labels), 400)
    assert error == pytest.approx(resampled.standard_error, rel=0.15)


def test_what_chance_does_to_perplexity():
    """The formula against resampling the texts, short ones and long ones."""
    generator = np.random.default_rng(1)
    tokens = generator.integers(20, 400, size=300)
    losses = tokens * generator.normal(2, 0.4, size=300) + generator.normal(0, 5, size=300)

    def score(losses, tokens):
        return np.exp(losses.sum() / tokens.sum())

    resampled = scipy.stats.bootstrap(
        (losses, tokens), score, paired=True, vectorized=False, n_resamples=2000, method="percentile", rng=generator
    )
    result = metric("perplexity").compute(predictions=losses.tolist(), references=tokens.tolist())
    assert result["perplexity"] == pytest.approx(score(losses, tokens))
    assert result["perplexity_error"] == pytest.approx(resampled.standard_error, rel=0.1)
    # A run without an error of its own has that of the dense model, in per cent.
    assert summary.chance("perplexity", 10.0, {"perplexity": 4.0, "perplexity_error": 0.1}) == pytest.approx(0.25)


def test_the_dense_score_has_its_chance(pages, tmp_path):
    folder = write_runs(tmp_path / "grid", {("ours", 0.5, 16_000, "own", 0): 0.7, ("liar", 0.5, 16_000, "own", 0): 0.6})
    change_dense(folder, examples=475)
    assert [row[4] for row in body(pages.glue())] == ["0.950 ± 0.010", "0.000", "1.000"]


def test_results_in_short_name_the_best_of_the_others():
    row = pandas.Series({"mask_only": 30.0, "liar": 20.0, "grail": np.nan, "osscar": 22.0, "ours": 21.0})
    assert publish._in_short(row, ".1f", more=False) == ["30.0", "**20.0** (LIAR, paper)", "21.0"]
    assert publish._in_short(row, ".1f", more=True) == ["**30.0**", "22.0 (OSSCAR)", "21.0"]


def write_runs(folder, values, **coordinates):
    """{(rule, keep, tokens, source, seed): accuracy} as a file of records of a task, with that of its dense model."""
    shared = {"task": "glue-sst2", "model": "m", "criterion": "fluctuation", **coordinates}
    file = results.ResultFile(run_keys.grid_file(folder, shared["task"], shared["model"]))
    dense = run_keys.dense_key(shared["task"], shared["model"])
    if file.find(**dense) is None:
        file.append({**dense, "accuracy": 0.95, "kl": 0.0, "agreement": 1.0})
    for (rule, keep, tokens, source, seed), value in values.items():
        where = {"rule": rule, "keep": keep, "tokens": tokens, "source": source, "seed": seed}
        file.append({**shared, **where, "accuracy": value, "kl": 1 - value, "agreement": value, "seconds": 10 * value + seed})
    return folder


def change(folder, change_record):
    for path in folder.glob("*.jsonl"):
        path.write_text("".join(results.line_of(change_record(record)) for record in results.read_records(path)))


def change_dense(folder, **numbers):
    change(folder, lambda record: record | numbers if record["rule"] == "dense" else record)


@pytest.fixture
def pages(monkeypatch, tmp_path):
    """The module `publish`, with the runs of the test's folder."""
    monkeypatch.setattr(publish, "runs", lambda: summary.runs.__wrapped__(tmp_path / "grid"))
    return publish


def body(text):
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines()[2:]]


def test_pages_show_mean_and_standard_error_and_leave_out_what_is_missing(pages, tmp_path):
    values = {("bias", 0.5, 16000, "own", 0): 0.6, ("bias", 0.5, 16000, "own", 1): 0.8, ("ours", 0.5, 16000, "own", 1): 0.9}
    values |= {("ours", 0.5, 16000, "own", 0): 0.9, ("liar", 0.5, 16000, "own", 0): 0.5, ("liar", 0.5, 16000, "own", 1): 0.5}
    values |= {("ours", 0.5, 16000, "own", 2): 0.1}  # the others have not had these texts
    write_runs(tmp_path / "grid", values | {("bias", 0.7, 16000, "own", 0): 0.8, ("liar", 0.7, 16000, "own", 0): 0.75})
    wanda = {("ours", 0.5, 16000, "own", 0): 0.1, ("liar", 0.5, 16000, "own", 0): 0.05, ("ours", 0.3, 16000, "own", 0): 0.2}
    write_runs(tmp_path / "grid", wanda, criterion="wanda")
    text = pages.glue()
    # A column for every rule that was run.
    assert text.startswith("| task | kept | number | samples | dense | bias (FLAP) | LIAR | **ours** |\n")
    assert len(body(text)) == 6
    accuracy = body(text)[3]
    assert accuracy[:5] == ["glue-sst2", "50%", "accuracy ↑", "2", "0.950"]
    assert accuracy[5:] == ["0.700 ± 0.100", "0.500 ± 0.000", "**0.900 ± 0.000**"]
    first = [cell.strip() for cell in text.splitlines()[2][1:-1].split("|")]
    assert first[5:] == ["**0.800**", "0.750", ""]
    assert body(text)[4][2:6] == ["kl ↓", "2", "0.000", "0.300 ± 0.100"]
    # Where one rule alone was run there is nothing to compare.
    assert [[cell for cell in row[5:] if cell] for row in body(pages.glue("wanda"))][:1] == [["0.050", "**0.100**"]]
    assert len(body(pages.glue("wanda"))) == 3


def test_pages_compare_what_was_run_on_both_sides(pages, tmp_path):
    own = {("ours", keep, 16000, "own", seed): keep + seed / 10 for keep in (0.5, 0.7) for seed in (0, 1, 2)}
    trained = {("fine_tuning", 0.5, 16000, "own", seed): 0.9 for seed in (0, 2)}
    other = {("ours", 0.7, 16000, "c4-sentences", 0): 0.4, ("ours", 0.7, 1000, "own", 0): 0.3}
    write_runs(tmp_path / "grid", own | trained | other)
    assert body(pages.fine_tuning()) == [
        ["glue-sst2", "50%", "16,000", "accuracy ↑", "2", "0.950", "0.600 ± 0.100", "**0.900 ± 0.000**"],
        ["glue-sst2", "50%", "16,000", "kl ↓", "2", "0.000", "0.400 ± 0.100", "**0.100 ± 0.000**"],
        ["glue-sst2", "50%", "16,000", "seconds ↓", "2", "", "7.0", "10.0"],
    ]
    assert [row[1:5] for row in body(pages.other_texts())] == [
        ["70%", "16,000", source, number] for source in ("c4-sentences", "own") for number in ("accuracy ↑", "kl ↓")
    ]
    assert [row[3] for row in body(pages.other_tokens())] == ["1,000"]


def test_selections_are_compared_on_the_texts_that_most_have_had(pages, tmp_path):
    own = lambda *values: {(run_keys.SELECTED, keep, 16000, "own", seed): value for keep, seed, value in values}  # noqa: E731
    write_runs(tmp_path / "grid", own((0.5, 0, 0.6), (0.5, 1, 0.8), (0.7, 0, 0.9)), criterion="random")
    write_runs(tmp_path / "grid", own((0.5, 0, 0.65), (0.5, 2, 0.1)), criterion="kwon")
    write_runs(tmp_path / "grid", own((0.5, 0, 0.7), (0.5, 1, 0.9)), criterion="reconstruction")
    write_runs(tmp_path / "grid", {("liar", 0.7, 16000, "own", 0): 0.9}, criterion="wanda")
    text = pages.criteria()
    assert text.startswith("| task | kept | number | samples | dense | reconstruction | Kwon et al. | random |\n")
    # Sample 0 has three selections, sample 1 two, and sample 2 nothing to compare with; nor has the other share.
    shared = ["glue-sst2", "50%"]
    assert body(text) == [
        [*shared, "accuracy ↑", "1", "0.950", "**0.700**", "0.650", "0.600"],
        [*shared, "kl ↓", "1", "0.000", "**0.300**", "0.350", "0.400"],
    ]
    write_runs(tmp_path / "grid", own((0.5, 1, 0.55)), criterion="kwon")
    assert body(pages.criteria())[0] == [
        *shared,
        "accuracy ↑",
        "2",
        "0.950",
        "**0.800 ± 0.100**",
        "0.600 ± 0.050",
        "0.700 ± 0.100",
    ]


# Tables of benchmarks that have results of their own, which are always there.
ELSEWHERE = (
    "families",
    "gpu wikitext exact rotary",
    "speed",
    "cost",
    "select",
    "growth",
    "scaling",
    "offload",
    "planned cases",
    "planned sizes",
    "samples",
    "more text",
    "more text of a language model",
    "latency",
    "elimination",
    "few tokens",
    "standing",
    "standing by task",
    "standing of selections",
    "behind",
    "standing common",
    "behind common",
    "standing common fluctuation",
    "behind common fluctuation",
    "common sense",
    "gpu common sense",
    "inference",
    "damping",
    "onnx",
    "lora",
    "llama cpp",
    "self generation",
    "rethinking",
    "free lunch",
    "free lunch costs",
    "starts",
    "starts saved",
    "steps",
)


def test_pages_without_a_run_have_headings_only(pages):
    of_the_grid = {name: make for name, make in pages.TABLES.items() if name not in ELSEWHERE}
    assert all(body(make()) == [] for make in of_the_grid.values())


def test_pages_tell_models_apart(pages, tmp_path):
    for model in ("small", "large"):
        write_runs(tmp_path / "grid", {("ours", 0.5, 1000, "own", 0): 0.4}, model=model)
    assert sorted(row[4] for row in body(pages.other_tokens())) == ["large", "small"]


def test_published_figures_show_every_rule(pages, tmp_path):
    values = {(rule, keep, 16000, "own", 0): 2 + keep for rule in pages.CLOSED_FORM for keep in (0.5, 0.7)}
    write_runs(tmp_path / "grid", values)
    file = tmp_path / "deep" / "figure.svg"
    figures.save(figures.published({"glue-sst2": pages.part(place=0)}, "keep", pages.CLOSED_FORM), file)
    labels = summary.LABELS
    assert {labels[rule] for rule in pages.CLOSED_FORM} | {"dense"} <= set(re.findall(r"<!-- (.+?) -->", file.read_text()))


def test_an_image_knows_what_is_drawn_in_it(pages, tmp_path):
    file, drawn = tmp_path / "figure.png", []
    for value in (0.5, 0.6):
        write_runs(tmp_path / "grid", {("ours", value, 16000, "own", 0): 0.8})
        drawn.append(figures.published({"a title": pages.part(place=0)}, "keep", pages.CLOSED_FORM))
    assert figures.fingerprint_of(file) is None
    figures.save(drawn[0], file)
    assert figures.fingerprint_of(file) == figures.fingerprint(drawn[0]) != figures.fingerprint(drawn[1])


def test_masks_are_counted_by_their_label_sampling(pages, tmp_path):
    runs = {(rule, 0.5, 16000, "own", seed): 0.5 for rule in ("ours", "liar") for seed in (0, 1, 2)}
    folder = write_runs(tmp_path / "grid", runs, criterion="fisher")
    change(folder, lambda run: run | {"labels": "by batch" if run["seed"] else "by sequence"} if "seed" in run else run)
    write_runs(folder, runs, criterion="wanda")
    assert body(pages.label_sampling()) == [["glue-sst2", "fisher", "1", "2"]]


def test_every_table_is_on_a_page():
    text = "".join(page.read_text(encoding="utf-8") for page in publish.pages())
    assert {match["name"] for match in publish.RESULT_BLOCK.finditer(text)} == set(publish.TABLES)


def test_the_committed_tables_and_figures_are_current():
    assert publish.stale() == []


def test_committed_runs_are_there_once():
    for path in (results.RESULTS / "grid").glob("*.jsonl"):
        records = results.read_records(path)
        assert path.read_bytes().endswith(b"\n")
        keys = [tuple(record.get(name) for name in (*summary.SETTING, "rule")) for record in records]
        assert len(set(keys)) == len(keys)
        assert {run_keys.grid_file(path.parent, record["task"], record["model"]) for record in records} == {path}
        assert sum(record["rule"] == "dense" for record in records) == 1


def test_rules_of_a_setting_have_masks_of_one_label_sampling():
    frame = summary.runs()
    sampled = frame[frame["criterion"].isin(SAMPLE_LABELS)]
    assert set(sampled["labels"]) <= {"by batch", "by sequence"}
    assert sampled.groupby(summary.SETTING)["labels"].nunique().max() == 1
    assert frame.loc[~frame["criterion"].isin(SAMPLE_LABELS), "labels"].isna().all()


def test_the_error_of_a_subset_is_that_of_least_squares():
    generator = np.random.default_rng(2)
    x, weight = generator.normal(size=(50, 6)) @ generator.normal(size=(6, 6)), generator.normal(size=(6, 3))
    unit_mask = remaining(torch.tensor([4, 1, 0, 5, 3, 2]), 4)
    assert unit_mask.tolist() == [True, False, True, True, False, True]
    kept = unit_mask.numpy()
    missed = x @ weight - x[:, kept] @ np.linalg.lstsq(x[:, kept], x @ weight, rcond=None)[0]
    assert error(torch.from_numpy(x.T @ x), torch.from_numpy(weight), unit_mask) == pytest.approx(np.square(missed).sum())


@pytest.fixture
def few_cases(monkeypatch):
    some = {name: fitted_weights.CASES[name] for name in ("bert-layer-output", "gpt2")}
    monkeypatch.setattr(fitted_weights, "CASES", some)


def test_fitted_weights_are_equal_to_themselves(few_cases, tmp_path, capsys):
    fitted_weights.save(tmp_path)
    assert fitted_weights.compare(tmp_path)
    assert capsys.readouterr().out.splitlines()[2:] == ["equal bert-layer-output", "equal gpt2"]


@pytest.mark.parametrize(("change_weight", "near"), [(lambda x: x.nextafter(x + 1), True), (lambda x: x * 1.0001, False)])
def test_a_changed_weight_is_seen(few_cases, tmp_path, capsys, change_weight, near):
    fitted_weights.save(tmp_path)
    path = tmp_path / "gpt2.safetensors"
    weights = fitted_weights.load_file(path)
    name = next(name for name, value in weights.items() if value.ndim == 2)
    weights[name] = change_weight(weights[name])
    fitted_weights.save_file(weights, path)
    assert fitted_weights.compare(tmp_path) is near
    assert re.search(r"differs by \d\.\de-\d\d gpt2", capsys.readouterr().out)


def test_a_weight_of_another_shape_is_seen():
    assert fitted_weights.difference({"a": torch.ones(2)}, {"a": torch.ones(3)}) == math.inf
    assert fitted_weights.difference({"a": torch.ones(2)}, {"b": torch.ones(2)}) == math.inf
    assert fitted_weights.difference({"a": torch.ones(2)}, {"a": torch.ones(2).double()}) == math.inf
    nan = {"a": torch.tensor([1.0, torch.nan])}
    assert fitted_weights.difference(nan, nan) == 0
    assert fitted_weights.difference(nan, {"a": torch.tensor([1.0, 0.0])}) == math.inf


@pytest.mark.parametrize("way", gpu.WAYS)
def test_the_gpu_benchmark_runs_small_on_a_processor(way):
    """It times all verbs, and would notice a device that gives something else."""
    arguments = gpu.parsed(
        ["--device", "cpu", "--sequences", "4", "--length", "32", "--layers", "2", "--width", "256", "--keep", "0.5"]
    )
    run = gpu.measure(0.5, way, arguments)
    assert min(run[f"{verb}_seconds"] for verb in ("plain", "reconstruct", "prune")) > 0
    assert sum(run["stages"].values()) <= run["prune_seconds"]
    assert {"aten::addmm", "aten::mm", "aten::bmm"} & set(run["largest_kernels"]), "products of matrices take most time"
    assert run["agreement"] <= gpu.AGREE


def test_powers_are_those_of_the_points():
    assert growth.power([1, 2, 4], [3, 24, 192]) == pytest.approx(3)


def test_samples_put_the_constants_back():
    before = fisher.TOKENS

    def interrupted():
        with samples.constants({("liar.selection.fisher", "TOKENS"): 5}):
            assert fisher.TOKENS == 5
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert before == fisher.TOKENS


def test_every_constant_of_the_samples_is_there():
    keys = [key for group in samples.CONSTANTS.values() for key in group] + list(samples.MORE)
    with samples.constants(dict.fromkeys(keys, 1)):
        pass


def test_parts_of_a_selection_stand_beside_their_operations():
    run = {
        "model": "m",
        "tokens": 2_048,
        "operations": {"select: forward": {"float32": 4e9}, "select: elimination": {"float64": 1e9}, "other": {"float32": 1.0}},
        "rates": {"float32": 2e9, "float64": 1e9},
        "plain_seconds_median": 4.0,
        "stages_median": {"prune": {"select: forward": 0.75, "select: elimination": 0.5}},
    }
    assert speed.parts_of_select(run) == [
        ["m, 2,048", "forward", "0.75", "4", "0.50"],
        ["m, 2,048", "elimination", "0.50", "1", "0.25"],
    ]


def test_the_first_blocks_of_the_dense_model_are_replaced_one_by_one():
    """A hybrid has the streams of the repaired model up to its last repaired block, and the dense blocks after it."""
    dense, repaired = (tiny_model("llama", head="causal-lm", num_hidden_layers=3) for _ in range(2))
    batches = tiny_batches(dense)[:1]
    liar.prune(repaired, batches, keep=0.5, criterion="random", progress=False)
    want, logits = by_block.streams(repaired, batches)
    hidden = dense(**batches[0], output_hidden_states=True).hidden_states
    # The last of them is after the final norm.
    for got, whole in zip(by_block.streams(dense, batches)[0][:-1], hidden[1:-1], strict=True):
        torch.testing.assert_close(got, whole[:, 1:].flatten(0, 1))
    for number, model in enumerate(by_block.hybrids(dense, repaired), 1):
        streams, last = by_block.streams(model, batches)
        torch.testing.assert_close(streams[:number], want[:number])
        assert [type(block) for block in model.model.layers[number:]] == [type(dense.model.layers[0])] * (3 - number)
        assert torch.allclose(last, logits) == (number == 3)


def more_text_run(rule, tokens, loss):
    """A run whose four texts lose so much per token."""
    names = {
        "task": "tinystories",
        "model": "m",
        "source": "own",
        "criterion": "fluctuation",
        "keep": 0.5,
        "mask_tokens": 40,
        "seed": 0,
    }
    per_example = results.packed(np.array([[10 * (loss + text / 100), 10] for text in range(4)]))
    return {**names, "rule": rule, "tokens": tokens, "perplexity": math.exp(loss + 0.015), "per_example": per_example}


def test_more_text_counts_the_steps_that_make_a_repair_worse(tmp_path, monkeypatch):
    monkeypatch.setattr(more_text, "RESULTS", tmp_path)
    results.ResultFile(tmp_path / "grid" / "tinystories-m.jsonl").append(
        {**run_keys.dense_key("tinystories", "m"), "perplexity": 2.0}
    )
    losses = {"liar": (2.0, 1.9, 1.8), "ours": (1.5, 1.4, 1.45)}
    runs = [more_text_run(rule, 10 * 2**n, loss) for rule, series in losses.items() for n, loss in enumerate(series)]
    # In any order of the file.
    liar_row, ours = sorted(more_text.rows(runs[::-1]), key=lambda row: row[5])
    shown = [math.exp(loss + 0.015) for loss in losses["ours"]]
    assert ours[5:9] == ["ours", "10, 20, 40", ", ".join(f"{value:.2f}" for value in shown), "1 / 0 / 1"]
    start = [math.exp(loss + 0.015) for loss in losses["liar"]]
    assert ours[9] == ", ".join(f"{(b - a) / (b - 2):.0%}" for a, b in zip(shown, start, strict=True))
    assert liar_row[8:] == ["2 / 0 / 0", ""]


def test_more_text_repairs_one_mask(mrpc, classifier, monkeypatch):
    given = []

    def spy(model, mask, calib):
        given.append((mask, calib))
        liar.remove(model, mask)

    monkeypatch.setattr(more_text, "RULES", {"spy": spy})
    bench = grid.Bench(TASKS["glue-mrpc"], classifier, mrpc)
    masked = grid.SharedInputs(bench, run_keys.Setting("glue-mrpc", "model", "fluctuation", 0, "own", 0.6, 600))
    runs = [more_text.measure("spy", masked, tokens) for tokens in (300, 600)]
    assert runs[0]["kl"] == runs[1]["kl"] > 0, "the dense model is left as it is"
    (less, first), (more, second) = given
    assert less is more
    assert [sum(int(batch["attention_mask"].sum()) for batch in calib) for calib in (first, second)] == [300, 600]
    texts = [
        {
            tuple(ids[mask.bool()].tolist())
            for batch in calib
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        }
        for calib in (first, second)
    ]
    assert len(texts[0] - texts[1]) <= 1, "the same texts, and more; the last of the fewer ones is cut"
