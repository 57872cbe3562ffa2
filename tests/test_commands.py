"""One command per benchmark, from its command line to its records and tables, on tiny data and models."""

import runpy
import sys

import numpy as np
import pytest

from benchmarks import inference
from benchmarks.results import read_records
from benchmarks.selections import searched
from liar.testing import tiny_model


@pytest.fixture
def folder(write):
    """A data folder with a little of everything."""
    generator = np.random.default_rng(0)
    words = lambda count: " ".join(f"w{word}" for word in generator.integers(0, 80, count))  # noqa: E731
    pairs = [{"sentence1": words(9), "sentence2": words(7), "label": number % 2} for number in range(120)]
    answers = {"text": ["w1"], "answer_start": [0]}
    articles = [
        {"id": str(n), "title": f"t{n % 3}", "context": words(30), "question": words(5), "answers": answers} for n in range(60)
    ]
    lines = [f" = Article {n} = \n {words(60)} " for n in range(30)]
    files = {
        "mrpc/train.jsonl.gz": pairs[:80],
        "mrpc/dev.jsonl.gz": pairs[80:],
        "squad_v1.1/dev.jsonl.gz": articles,
        "wikitext2/raw_train_first_1MB.txt.gz": lines,
        "wikitext2/raw_test.txt.gz": lines[:20],
        "c4/sample.jsonl.gz": [{"text": words(90)} for _ in range(20)],
        "piqa/validation.jsonl.gz": [{"goal": words(3), "sol1": words(3), "sol2": words(2), "label": n % 2} for n in range(8)],
    }
    for name, rows in files.items():
        written = write(name, rows)
    (written / "squad_v1.1/heldout_titles.json").write_text('["t0"]')
    return written


@pytest.fixture
def saved(tmp_path, tokenizer, plain_tokenizer):
    """Saves a tiny model with its tokenizer."""

    def save(name, family, head, **options):
        target = tmp_path / "models" / name
        tiny_model(family, head=head, seed=1, **options).save_pretrained(target)
        used = tokenizer if family == "bert" else plain_tokenizer
        used.eos_token = used.eos_token or used.unk_token
        used.save_pretrained(target)
        return str(target)

    return save


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a command; gives its records and what it printed."""

    def run(name, *arguments, results="results"):
        monkeypatch.setattr(sys, "argv", [f"benchmarks.{name}", *map(str, arguments), "--results", str(tmp_path / results)])
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
        paths = [tmp_path / results] if (tmp_path / results).is_file() else sorted((tmp_path / results).glob("*.jsonl"))
        return [record for path in paths for record in read_records(path)], capsys.readouterr().out

    return run


def test_glue(folder, saved, run):
    model = saved("glue-mrpc", "bert", "sequence-classification", num_labels=2).replace("mrpc", "{task}")
    arguments = (
        "--task",
        "mrpc",
        "--model",
        model,
        "--data-dir",
        folder,
        "--keep",
        0.5,
        "--rules",
        "mask_tuning",
        "kprune",
        "ours",
    )
    records, printed = run("glue", *arguments)
    assert [record["rule"] for record in records] == [
        "dense",
        *["mask_tuning", "kprune", "ours"] * 2,
        *["kprune", "ours"] * 2,
        *["mask_tuning", "ours"] * 2,
    ]
    assert {record.get("criterion") for record in records} == {None, "reconstruction", "kprune", "kwon"}
    assert all(record["per_example"]["shape"] == [40, 1] for record in records)
    assert "glue-mrpc: accuracy" in printed
    # What is there is not run again.
    assert run("glue", *arguments)[0] == records


def test_a_plan_stops_in_time_and_goes_on(folder, saved, run):
    model = saved("mrpc", "bert", "sequence-classification", num_labels=2)
    arguments = ("--task", "mrpc", "--model", model, "--data-dir", folder, "--keep", 0.5, "--rules", "mask_only", "liar")
    begun, _ = run("glue", *arguments, "--hours", 0)
    assert [record["rule"] for record in begun] == ["dense"]
    done, _ = run("glue", *arguments)
    assert [record["rule"] for record in done] == ["dense", *["mask_only", "liar"] * 2]


def test_what_the_plan_does_not_have(folder, saved, run, capsys):
    model = saved("mrpc", "bert", "sequence-classification", num_labels=2)
    with pytest.raises(SystemExit):
        run("glue", "--model", model, "--data-dir", folder, "--keep", 0.123)
    assert "the plan has no such cells; benchmarks.grid runs any" in capsys.readouterr().err


def test_squad(folder, saved, run):
    model = saved("squad", "bert", "question-answering")
    records, printed = run("squad", "--model", model, "--data-dir", folder, "--keep", 0.5, "--rules", "mask_only", "ours")
    cells = [(record.get("source"), record.get("tokens"), record["rule"]) for record in records[1:]]
    assert cells == [
        *[("own", 64_000, rule) for _ in range(2) for rule in ("mask_only", "ours")],
        *[(source, 192_000, "ours") for source in ("own", "evaluated")],
    ]
    assert {"f1", "exact_match", "agreement", "examples"} <= set(records[-1])
    assert "squad: f1" in printed


def test_wikitext(folder, saved, run, monkeypatch):
    monkeypatch.setattr(searched, "GENERATIONS", 1)
    monkeypatch.setattr(searched, "OFFSPRING", 2)
    model = saved("llama", "llama", "causal-lm", max_position_embeddings=512, num_hidden_layers=3)
    records, printed = run(
        "wikitext",
        "--task",
        "wikitext-512",
        "--model",
        model,
        "--data-dir",
        folder,
        "--keep",
        0.8,
        "--rules",
        "mask_only",
        "ours",
    )
    assert {record.get("criterion") for record in records} >= {
        "flap",
        "osscar",
        "llm_pruner",
        "wanda",
        "searched",
        "reconstruction",
    }
    assert {record.get("source") for record in records} == {None, "own", "c4"}
    assert all(record["achieved"] <= 0.8 for record in records[1:])
    assert all(record["predicted"] == 511 * record["examples"] for record in records)
    assert "wikitext-512: perplexity" in printed


def test_commonsense(folder, saved, run):
    model = saved("llama", "llama", "causal-lm")
    records, _ = run("commonsense", "--model", model, "--data-dir", folder, "--keep", 0.5, "--rules", "ours")
    assert [record["rule"] for record in records] == ["dense", "ours"]
    assert set(records[1]["tasks"]) == {"piqa acc", "piqa acc_norm"}
    assert (records[1]["shots"], records[1]["limit"]) == (0, 200)


def test_inference(saved, run, monkeypatch):
    monkeypatch.setattr(inference, "TOKENS", 300)
    monkeypatch.setattr(inference, "PROMPT", 20)
    monkeypatch.setattr(inference, "WRITTEN", 3)
    model = saved("llama", "llama", "causal-lm", max_position_embeddings=256)
    arguments = ("--model", model, "--keep", 0.5, "--rounds", 2, "--no-compile")
    (record,), printed = run("inference", *arguments, results="inference.jsonl")
    assert record["parameters"][0] > record["parameters"][1]
    assert record["megabytes"][0] > record["megabytes"][1]
    assert {"1 x 128", "8 x 128"} < set(record["seconds"])
    assert len(record["seconds"]) == 4
    assert "tokens/s" in printed
