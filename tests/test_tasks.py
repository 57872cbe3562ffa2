"""The tasks of the benchmarks: where data comes from, SQuAD, WikiText and common sense, on tiny data and models."""

import copy
import json
import math
import os
import shutil
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from lm_eval.tasks import TaskManager

from benchmarks import data, finetune
from benchmarks.metrics import metric
from benchmarks.metrics.squad import best, exact_match, f1
from benchmarks.paired import resampled
from benchmarks.tasks import TASKS, commonsense, squad, wikitext
from benchmarks.tasks.table import without
from liar.testing import tiny_model

# Where data comes from

ROWS = "import sys; from benchmarks.data import read; print(list(read(None, sys.argv[1]))[:2])"
MODEL = "import sys; from benchmarks.tasks import TASKS; print(TASKS['glue-mrpc'].load(sys.argv[1])[0].config.num_labels)"


def run_offline(home, code, name):
    """In a process of its own: `datasets` reads its environment once."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", code, name], env=environment, capture_output=True, text=True, check=False)


def test_the_hub_is_read_from_its_cache_and_what_is_not_there_is_said(tmp_path):
    """A cache as `datasets` leaves it after a download of `nyu-mll/glue`, made from a folder with the same layout."""
    source = tmp_path / "glue"
    rows = datasets.Dataset.from_dict({"sentence": ["a text", "b"], "label": [1, 0], "idx": [0, 1]})
    (source / "cola").mkdir(parents=True)
    rows.to_parquet(source / "cola" / "train-00000-of-00001.parquet")
    config = {"config_name": "cola", "data_files": [{"split": "train", "path": "cola/train-*"}]}
    (source / "README.md").write_text(f"---\nconfigs:\n- {json.dumps(config)}\n---\n")
    datasets.load_dataset(str(source), "cola", cache_dir=str(tmp_path / "made"))
    (made,) = {path.parent for path in (tmp_path / "made").rglob("*.arrow")}
    cached = tmp_path / "home" / "datasets" / "nyu-mll___glue" / "cola" / "0.0.0" / ("0" * 40)
    shutil.copytree(made, cached)
    found = run_offline(tmp_path / "home", ROWS, "cola/train")
    assert "'sentence': 'a text', 'label': 1" in found.stdout, found.stderr
    missing = run_offline(tmp_path / "home", ROWS, "sst2/dev")
    assert missing.returncode == 1
    assert "cannot read nyu-mll/glue sst2 validation from the Hugging Face hub" in missing.stderr
    assert missing.stderr.strip().endswith("go online, or pass --data-dir FOLDER with sst2/dev.jsonl.gz in it")
    assert "Traceback" not in missing.stderr


def test_models_come_from_the_cache_of_the_hub(tmp_path, tokenizer):
    """A cache as `huggingface_hub` leaves it after a download of `me/tiny`."""
    repository = tmp_path / "home" / "hub" / "models--me--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    tiny_model("bert", head="sequence-classification", num_labels=3).save_pretrained(snapshot)
    tokenizer.save_pretrained(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    found = run_offline(tmp_path / "home", MODEL, "me/tiny")
    assert found.stdout.strip().endswith("3"), found.stderr


def test_a_folder_without_the_file_says_which(tmp_path):
    with pytest.raises(
        SystemExit, match=r"rte/dev.jsonl.gz: no such file; leave --data-dir out to read nyu-mll/glue from the hub"
    ):
        data.read(tmp_path, "rte/dev")


def test_texts_that_are_evaluated_on_are_not_calibrated_on():
    assert without(["a", "b", "c"], ["b", "d"]) == ["a", "c"]
    assert without([("a", "b"), ("c", "d")], [("x", "c")]) == [("a", "b")]


def test_every_glue_task_is_there_by_name():
    names = {name.removeprefix("glue-") for name in TASKS if name.startswith("glue-")}
    assert names == {"cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "mnli-mm", "qnli", "rte", "wnli"}
    assert data.DATA["mnli/dev-mismatched"].split == "validation_mismatched"


def test_cola_counts_matthews_correlation(write):
    rows = [{"sentence": f"w{number}", "label": int(number < 6)} for number in range(10)]
    folder = write("cola/dev.jsonl.gz", rows)
    task = TASKS["glue-cola"]
    predicted = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0, 0, 1])
    predictions = {"logits": torch.stack([1 - predicted, predicted], 1)}
    true_positive, true_negative, false_positive, false_negative = 4, 3, 1, 2
    product = (4 + 1) * (4 + 2) * (3 + 1) * (3 + 2)
    expected = (true_positive * true_negative - false_positive * false_negative) / math.sqrt(product)
    assert task.score(predictions, predictions, folder)["matthews"] == pytest.approx(expected)
    assert resampled("matthews", [task.examples(predictions, folder)])[0] == pytest.approx(expected)
    same = metric("matthews").compute(predictions=[1, 1, 1], references=[0, 1, 1])["matthews"]
    assert same == 0 == resampled("matthews", [np.array([[1, 0], [1, 1], [1, 1]])])[0]


# SQuAD


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "overlap"),
    [
        ("October 1973", ["October 1973", "1973"], 1, 1),
        ("the  October, 1973!", ["october 1973"], 1, 1),
        ("in October 1973", ["October 1973"], 0, 0.8),
        ("1973 1973", ["1973"], 0, 2 / 3),
        ("a cat", ["An cat"], 1, 1),
        ("U.S.", ["US"], 1, 1),
        ("nothing", ["something"], 0, 0),
        ("", [], 1, 1),
        ("", [""], 1, 1),
        ("word", [], 0, 0),
        ("", ["word"], 0, 0),
        # Nothing but an article is not an answer.
        ("the", ["a", "word"], 0, 0),
        ("the", ["a"], 1, 1),
    ],
)
def test_answers_by_the_official_rules(prediction, answers, exact, overlap):
    assert best(exact_match, prediction, answers) == exact
    assert best(f1, prediction, answers) == pytest.approx(overlap)
    result = metric("squad").compute(predictions=[prediction], references=[answers])
    assert result == {"f1": pytest.approx(overlap), "exact_match": exact}


def test_the_best_span_is_in_the_text_and_short():
    generator = torch.Generator().manual_seed(0)
    first, last = torch.randn(2, 60, generator=generator)
    in_text = torch.zeros(60, dtype=torch.bool)
    in_text[10:55] = True
    found = squad.best_span(first, last, in_text)
    allowed = [(i, j) for i in range(10, 55) for j in range(i, min(i + squad.LONGEST, 55))]
    one, other = max(allowed, key=lambda pair: first[pair[0]] + last[pair[1]])
    assert found == (pytest.approx(float(first[one] + last[other])), one, other)


@pytest.fixture
def articles(write):
    generator = np.random.default_rng(0)
    rows = []
    for number in range(24):
        words = [f"w{word}" for word in generator.integers(0, 60, 30 + 40 * (number % 3))]
        place = int(generator.integers(0, len(words) - 2))
        begin = len(" ".join(words[:place])) + (place > 0)
        rows.append({
            "id": str(number),
            "title": f"article {number % 4}",
            "context": " ".join(words),
            "question": f"  w{number} w1",
            "answers": {"text": [" ".join(words[place : place + 2])], "answer_start": [begin]},
        })  # fmt: skip
    folder = write("squad_v1.1/dev.jsonl.gz", rows)
    (folder / "squad_v1.1/heldout_titles.json").write_text('["article 1"]')
    return folder


def test_questions_are_asked_piece_by_piece(articles, tokenizer, monkeypatch):
    """Long paragraphs are read in pieces: the best span of all is the answer, in characters of the paragraph."""
    monkeypatch.setattr(squad, "MAX_LENGTH", 40)
    monkeypatch.setattr(squad.pieces, "__defaults__", (40,))
    model = tiny_model("bert", head="question-answering").eval()
    rows = data.read(articles, "squad/dev")
    spans = squad.predict(model, tokenizer, articles, every=1)["spans"]
    assert {row["title"] for row in rows} == {"article 1"}
    for row, (begin, end) in zip(rows, spans.tolist(), strict=True):
        encoded = squad.pieces(tokenizer, {name: [row[name]] for name in ("question", "context")})
        found = []
        for number, ids in enumerate(encoded["input_ids"]):
            kinds = {
                name: torch.tensor([encoded[name][number]]) for name in ("attention_mask", "token_type_ids") if name in encoded
            }
            with torch.no_grad():
                outputs = model(input_ids=torch.tensor([ids]), **kinds)
            in_text = torch.tensor([part == 1 for part in encoded.sequence_ids(number)])
            score, one, other = squad.best_span(outputs.start_logits[0], outputs.end_logits[0], in_text)
            offsets = encoded["offset_mapping"][number]
            found.append((score, offsets[one][0], offsets[other][1]))
        assert len(found) > 1 or len(row["context"].split()) < 40
        assert (begin, end) == max(found)[1:]
        assert row["context"][begin:end]
    task = TASKS["squad"]
    right = {"spans": torch.tensor([[row["answers"]["answer_start"][0]] * 2 for row in rows])}
    right["spans"][:, 1] += torch.tensor([len(row["answers"]["text"][0]) for row in rows])
    scored = task.score(right, right, articles)
    assert scored == {"f1": 1, "exact_match": 1, "agreement": 1, "examples": len(rows)}
    assert task.examples(right, articles).tolist() == [[1.0]] * len(rows)
    held_out = {row["context"] for row in rows}
    assert all(context not in held_out for _, context in task.texts(articles, "own", 0))
    fewer = TASKS["squad-every-4"]
    some = fewer.predict(model, tokenizer, articles)
    assert torch.equal(some["spans"], spans[::4])
    assert fewer.examples(some, articles).tolist() == task.examples({"spans": spans}, articles)[::4].tolist()
    assert fewer.score(some, some, articles)["examples"] == len(rows[::4]["title"]) < len(rows)


def test_answers_become_places_of_tokens(articles, tokenizer):
    rows, encoded = data.read(articles, "squad/train"), finetune.answered(articles, tokenizer)
    pieces = squad.pieces(tokenizer, rows)
    assert len(encoded) == len(pieces["input_ids"])
    whole = 0
    for number, row in enumerate(encoded):
        answer = rows[pieces["overflow_to_sample_mapping"][number]]["answers"]
        one, other = row["start_positions"], row["end_positions"]
        if (one, other) != (0, 0):
            whole += 1
            offsets = pieces["offset_mapping"][number]
            context = rows[pieces["overflow_to_sample_mapping"][number]]["context"]
            assert context[offsets[one][0] : offsets[other][1]] == answer["text"][0]
    assert whole >= len(rows)


# WikiText

LINES = [
    " ",
    " = Title = ",
    " ",
    *[f" w{n} w{n + 1} w{n + 2} " for n in range(30)],
    " = = Part = = ",
    " ",
    " = Other = ",
    " w5 w6 ",
]


@pytest.mark.parametrize(("length", "stride"), [(16, None), (16, 8), (16, 5), (7, None)])
def test_perplexity_of_windows_against_a_loop_over_tokens(write, plain_tokenizer, length, stride):
    """Every token is predicted once, by the window that counts it, from all that stands before it there."""
    folder = write("wikitext2/raw_test.txt.gz", LINES)
    model = tiny_model("llama", head="causal-lm").eval()
    task = wikitext.wikitext(length, stride=stride)
    ids = plain_tokenizer(wikitext.joined(folder, "test"), return_tensors="pt")["input_ids"][0]
    losses, begin, counted = [], 0, 1
    while begin + length <= len(ids):
        window = ids[begin : begin + length]
        for place in range(1, length):
            if begin + place >= counted:
                with torch.no_grad():
                    scores = model(window[None, :place]).logits[0, -1].double().log_softmax(-1)
                losses.append(-float(scores[window[place]]))
        counted = begin + length + (1 if stride is None else 0)
        begin += stride or length
    predicted = task.predict(model, plain_tokenizer, folder)
    scored = task.score(predicted, predicted, folder)
    assert scored["predicted"] == len(losses)
    assert scored["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert resampled("perplexity", [task.examples(predicted, folder)])[0] == pytest.approx(scored["perplexity"])


def test_the_beginning_of_the_text_and_too_little_of_it(write, plain_tokenizer):
    folder = write("wikitext2/raw_test.txt.gz", LINES)
    model = tiny_model("llama", head="causal-lm").eval()
    predicted = wikitext.wikitext(8, tokens=24).predict(model, plain_tokenizer, folder)
    assert predicted["tokens"].tolist() == [7, 7, 7]
    with pytest.raises(SystemExit, match="fewer than one window of 512"):
        TASKS["wikitext-512"].predict(model, plain_tokenizer, folder)


def test_lines_are_joined_as_everybody_joins_them_and_articles_are_texts(write):
    """The hub has a blank line as an empty string and others with their ends; so have files."""
    write("wikitext2/raw_train_first_1MB.txt.gz", LINES)
    folder = write("wikitext2/raw_test.txt.gz", LINES)
    hub = ["" if not line.strip() else line + "\n" for line in LINES]
    assert wikitext.joined(folder, "test") == "\n\n".join(hub)
    first, other = wikitext.articles(folder, "train")
    assert (first.split()[:3], other.split()) == (["=", "Title", "="], ["=", "Other", "=", "w5", "w6"])
    assert "= = Part = =" in first


# Common sense


@pytest.fixture
def choices(write):
    write(
        "piqa/validation.jsonl.gz", [{"goal": f"w{n}", "sol1": f"w{n + 1} w2", "sol2": "w3", "label": n % 2} for n in range(6)]
    )
    rows = [{"question": f"w{n} w9", "choices": [f"w{n + k} w{k}" for k in range(3 + n % 2)], "label": n % 3} for n in range(6)]
    return write("openbookqa/test.jsonl.gz", rows)


def test_common_sense_is_asked_of_what_a_folder_has(choices, plain_tokenizer):
    """The harness against likelihoods of the choices by hand."""
    model = tiny_model("llama", head="causal-lm").eval()
    task, plain_tokenizer = commonsense.commonsense(5), copy.deepcopy(plain_tokenizer)
    # The harness asks for one that begins a text.
    plain_tokenizer.eos_token = plain_tokenizer.unk_token
    predicted = task.predict(model, plain_tokenizer, choices)
    assert {name: len(value) for name, value in predicted.items()} == {
        "piqa acc": 5, "piqa acc_norm": 5, "openbookqa acc": 5, "openbookqa acc_norm": 5,
    }  # fmt: skip
    for number, right in enumerate(predicted["openbookqa acc"].tolist()):
        likelihoods = []
        for k in range(3 + number % 2):
            context, choice = f"w{number} w9", f" w{number + k} w{k}"
            ids = plain_tokenizer(context + choice, return_tensors="pt")["input_ids"]
            begin = len(plain_tokenizer(context)["input_ids"])
            with torch.no_grad():
                scores = model(ids).logits[0, :-1].double().log_softmax(-1)
            likelihoods.append(float(scores.gather(1, ids[0, 1:, None])[begin - 1 :].sum()))
        assert right == (int(np.argmax(likelihoods)) == number % 3)
    scored = task.score(predicted, predicted, choices)
    assert (scored["shots"], scored["limit"]) == (0, 5)
    norms = [float(predicted[f"{name} acc_norm"].mean()) for name in ("piqa", "openbookqa")]
    assert scored["acc"] == pytest.approx(np.mean(norms))
    assert scored["tasks"]["piqa acc"]["examples"] == 5
    assert resampled("acc", [task.examples(predicted, choices)])[0] == pytest.approx(scored["acc"])


def test_a_folder_without_common_sense_says_so(tmp_path, plain_tokenizer):
    with pytest.raises(SystemExit, match="none of the files"):
        commonsense.commonsense(5).predict(tiny_model("llama", head="causal-lm"), plain_tokenizer, tmp_path)


def test_all_task_files_are_of_the_harness_and_found(tmp_path):
    """Each local file has the prompt and the choices of the harness's own task of that name."""
    local = {path.stem for path in commonsense.FOLDER.glob("*.yaml")}
    assert local == set(commonsense.TASK_NAMES) - {"winogrande"}
    manager = TaskManager()
    assert set(commonsense.TASK_NAMES) <= set(manager.all_tasks)


def test_tasks_of_language_models_need_a_model():
    for name in ("wikitext-512", "commonsense", "squad", "glue-rte"):
        with pytest.raises(SystemExit, match="needs --model"):
            TASKS[name].load(None)
