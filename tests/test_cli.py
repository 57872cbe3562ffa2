"""The command line, on tiny models: what it writes, what it refuses, and that a run.json replays to the same bits."""

import gc
import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import MISSING
from importlib import import_module
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from typer.main import get_command
from typer.testing import CliRunner

import liar
from liar.cli import app
from liar.cli.run import Run
from liar.options import (
    CalibrationOptions,
    GenerateOptions,
    LoadOptions,
    PlanOptions,
    PruneOptions,
    ReconstructOptions,
    RefineOptions,
    RunOptions,
    SaveOptions,
    SelectOptions,
    SourceOptions,
    TeacherOptions,
    options_in,
)
from liar.versions import versions

WORDS = [f"w{number}" for number in range(96)]
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 64, "vocab_size": 100}
WRITTEN = {"config.json", "model.safetensors", "tokenizer.json", "liar.json", "mask.json", "report.json", "run.json"}


def call(*arguments, code=0):
    """Run a command in a wide terminal, and let errors that are not reported through."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "500"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done


def plain(output):
    """What is printed without the frames around it, and on one line."""
    return " ".join(re.sub(r"[\u2500-\u257f]", " ", output).split())


def refused(*arguments):
    """The message of a refusal: one paragraph on stderr, nothing on stdout, code 1."""
    done = call(*arguments, code=1)
    assert "Traceback" not in done.output
    assert done.stdout == ""
    message = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(message) == 1
    return message[0]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with models `bert` and `llama` and texts."""
    folder = tmp_path_factory.mktemp("home")
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[BOS]", "[EOS]", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    torch.manual_seed(0)
    models = {
        "bert": BertForSequenceClassification(BertConfig(**SIZES, num_labels=3)),
        "llama": LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.cls_token = "[BOS]" if name == "bert" else None
        tokenizer.save_pretrained(folder / name)
    draw = torch.Generator().manual_seed(0)
    lines = [" ".join(WORDS[i] for i in torch.randint(0, 96, (12,), generator=draw)) for _ in range(80)]
    (folder / "texts.txt").write_text("\n".join(lines[:40]) + "\n\n\n" + "\n".join(lines[40:]) + "\n")
    rows = "".join(json.dumps({"text": line, "body": line[::-1]}) + "\n" for line in lines)
    (folder / "texts.jsonl").write_text(rows)
    with gzip.open(folder / "texts.jsonl.gz", "wt") as file:
        file.write(rows)
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text(rows)
    return folder


@pytest.fixture(scope="module")
def pruned(home):
    """The BERT pruned to half: what is in the folder must not be changed."""
    call("prune", home / "bert", home / "pruned", "--keep", 0.5, "--calib", home / "texts.txt")
    return home / "pruned"


def tensors(folder):
    return liar.load(folder).state_dict()


def assert_same_result(one, other):
    torch.testing.assert_close(tensors(one), tensors(other), rtol=0, atol=0)
    assert liar.Mask.load(one / "mask.json") == liar.Mask.load(other / "mask.json")


@pytest.mark.parametrize("model", ["bert", "llama"])
def test_prune_writes_a_folder_that_works(home, tmp_path, model):
    done = call("prune", home / model, tmp_path / "slim", "--keep", 0.5, "--calib", home / "texts.txt", "--widths", "free")
    assert {path.name for path in (tmp_path / "slim").iterdir()} >= WRITTEN
    assert "of the block parameters kept (50.0% requested)" in done.stdout
    assert f"written to {tmp_path / 'slim'}" in done.stdout.replace("\n", "")
    slim, dense = liar.load(tmp_path / "slim"), liar.load(home / model)
    assert type(slim) is type(dense)
    assert slim.num_parameters() < dense.num_parameters()
    report = liar.Report.load(tmp_path / "slim" / "report.json")
    mask = liar.Mask.load(tmp_path / "slim" / "mask.json")
    assert report.tokens == 80 * 12
    assert {site.site: site.kept for site in report.sites} == {name: mask.kept(name) for name in mask.masks}
    assert report.achieved <= 0.5
    run = json.loads((tmp_path / "slim" / "run.json").read_text())
    assert run["run"]["model"] == str(home / model)
    assert run["versions"]["torch"] == torch.__version__


def test_prune_does_what_the_library_does(home, tmp_path):
    options = ["--criterion", "wanda", "--target", "layer_output", "--ridge", "0.01", "--solver", "eigh", "--tokens", 600]
    call(
        "prune",
        home / "llama",
        tmp_path / "slim",
        "--keep",
        0.6,
        "--calib",
        home / "texts.txt",
        *options,
        "--pack",
        "--max-length",
        50,
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(home / "llama")
    texts = (home / "texts.txt").read_text().splitlines()
    calib = liar.calibration(texts, tokenizer, tokens=600, pack=True, max_length=50)
    model = liar.load(home / "llama")
    liar.prune(model, calib, keep=0.6, criterion="wanda", target="layer_output", ridge=0.01, solver="eigh", progress=False)
    torch.testing.assert_close(tensors(tmp_path / "slim"), model.state_dict(), rtol=0, atol=0)


# Options -> (sequences compared, held out, tokens fitted to): the texts are 80 lines of 12 tokens.
COMPARED = {
    (): (4, False, 960),
    ("--tokens", 600): (4, True, 600),
    ("--tokens", 600, "--quality", 7): (7, True, 600),
    ("--tokens", 950): (4, False, 950),
    ("--tokens", 924): (3, True, 924),
    ("--set-aside",): (4, True, 912),
    ("--set-aside", "--quality", 10, "--tokens", 600): (10, True, 480),
    ("--pack", "--max-length", 48, "--tokens", 480): (1, True, 480),
}


@pytest.mark.parametrize("options", COMPARED, ids=str)
def test_outputs_are_compared_on_texts_that_are_left_over(home, tmp_path, options):
    call("prune", home / "bert", tmp_path / "slim", "--keep", 0.5, "--calib", home / "texts.txt", *options)
    report = liar.Report.load(tmp_path / "slim" / "report.json")
    assert (report.quality.sequences, report.quality.held_out, report.tokens) == COMPARED[options]
    done = call("replay", tmp_path / "slim" / "run.json", "--out", tmp_path / "again")
    assert liar.Report.load(tmp_path / "again" / "report.json").quality == report.quality
    assert report.quality.verdict.value in done.stdout


def test_the_comparison_can_be_turned_off(home, tmp_path):
    arguments = ["prune", home / "bert", tmp_path / "slim", "--keep", 0.5, "--calib", home / "texts.txt", "--tokens", 600]
    done = call(*arguments, "--quality", 0)
    assert liar.Report.load(tmp_path / "slim" / "report.json").quality is None
    assert "compared" not in done.stdout
    assert "set_aside=True says which sequences" in refused(*arguments, "--quality", 0, "--set-aside", "--force")


def test_texts_that_only_repeat_are_not_held_out(home, tmp_path):
    lines = (home / "texts.txt").read_text().splitlines()[:30]
    (tmp_path / "texts.txt").write_text("\n".join(lines * 2))
    call("prune", home / "bert", tmp_path / "slim", "--keep", 0.5, "--calib", tmp_path / "texts.txt", "--tokens", 360)
    report = liar.Report.load(tmp_path / "slim" / "report.json")
    assert (report.tokens, report.quality.sequences, report.quality.held_out) == (360, 3, False)


@pytest.mark.parametrize(("option", "mixed"), [("--mixed-lengths", True), ("--no-mixed-lengths", False)])
def test_long_texts_are_taken_as_the_library_does(home, tmp_path, option, mixed):
    (tmp_path / "long.txt").write_text("w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11 w12 w13 w14 w15 w16 w17\n" * 40)
    out = tmp_path / "slim"
    call("prune", home / "bert", out, "--keep", 0.6, "--calib", tmp_path / "long.txt", "--max-length", 16, option)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(home / "bert")
    texts = (tmp_path / "long.txt").read_text().splitlines()
    calib = liar.calibration(texts, tokenizer, max_length=16, mixed_lengths=mixed)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in calib)
    assert (tokens < 16 * 40) is mixed
    assert liar.Report.load(out / "report.json").tokens == tokens
    assert json.loads((out / "run.json").read_text())["run"]["calibration"]["mixed_lengths"] is mixed


def test_reconstruct_with_the_mask_of_a_run_gives_the_same(home, pruned, tmp_path):
    call("reconstruct", home / "bert", tmp_path / "again", "--mask", pruned / "mask.json", "--calib", home / "texts.txt")
    assert_same_result(pruned, tmp_path / "again")


def test_select_and_reconstruct_are_prune(home, pruned, tmp_path):
    file = tmp_path / "mask.json"
    before = {path.name: path.read_bytes() for path in (home / "bert").iterdir()}
    printed = call("select", home / "bert", file, "--keep", 0.5, "--calib", home / "texts.txt").stdout
    assert {path.name: path.read_bytes() for path in (home / "bert").iterdir()} == before
    mask, layout = liar.Mask.load(file), liar.discover(liar.load(home / "bert"))
    assert mask.requested == 0.5
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines()[: len(layout.sites)]}
    assert rows == {site.name: [str(mask.kept(site.name)), "of", str(site.units)] for site in layout.sites}
    share = f"{mask.parameters(layout) / layout.parameters:.1%}"
    assert f"{share} of the block parameters kept; written to {file}" in printed.replace("\n", "")
    call("reconstruct", home / "bert", tmp_path / "slim", "--mask", file, "--calib", home / "texts.txt")
    assert_same_result(pruned, tmp_path / "slim")
    assert liar.Report.load(tmp_path / "slim" / "report.json").requested == 0.5


def test_what_was_pruned_can_be_pruned_again(home, tmp_path):
    """Also a LLaMA whose layers keep different numbers of heads: what need not build the model reads the folder."""
    file = tmp_path / "mask.json"
    file.write_text(json.dumps({"heads.0": [0], "neurons.1": list(range(40))}))
    source = ["--calib", home / "texts.txt"]
    call("reconstruct", home / "llama", tmp_path / "slim", "--mask", file, *source)
    assert AutoTokenizer.from_pretrained(tmp_path / "slim")("w1").input_ids
    assert AutoConfig.from_pretrained(tmp_path / "slim").is_heterogeneous
    with pytest.raises(Exception, match="per-layer attribute"):
        AutoModel.from_pretrained(tmp_path / "slim")
    call("prune", tmp_path / "slim", tmp_path / "slimmer", "--keep", 0.8, *source)
    assert liar.load(tmp_path / "slimmer").num_parameters() < liar.load(tmp_path / "slim").num_parameters()
    call("select", tmp_path / "slim", tmp_path / "other.json", "--keep", 0.8, *source)
    assert liar.Mask.load(tmp_path / "other.json") == liar.Mask.load(tmp_path / "slimmer" / "mask.json")


def test_select_by_weights_needs_no_data(home, tmp_path):
    """Nor a tokenizer, nor a look at the texts where there are some."""
    model = liar.load(home / "llama")
    model.save_pretrained(tmp_path / "bare")
    options = ["--keep", 0.6, "--criterion", "magnitude", "--widths", "balanced", "--protect", "heads.0", "--protect", 2]
    call("select", tmp_path / "bare", tmp_path / "mask.json", *options)
    expected = liar.select(model, keep=0.6, criterion="magnitude", widths="balanced", protect=["heads.0", 2])
    assert liar.Mask.load(tmp_path / "mask.json") == expected
    call("select", tmp_path / "bare", tmp_path / "mask.json", *options, "--calib", home / "texts.txt", "--force")
    assert liar.Mask.load(tmp_path / "mask.json") == expected


def test_select_says_what_is_missing(home, tmp_path):
    file = tmp_path / "mask.json"
    message = refused("select", home / "bert", file, "--keep", 0.5)
    assert "criterion='reconstruction' needs activations: give texts with --calib" in message
    assert "cannot be met" in refused("select", home / "bert", file, "--keep", 0.01, "--criterion", "magnitude")
    assert "there is no folder" in refused("select", home / "bert", tmp_path / "none" / "mask.json", "--keep", 0.5)
    assert not file.exists()


def test_select_refuses_to_overwrite_before_anything_is_loaded(home, tmp_path):
    file = tmp_path / "mask.json"
    file.write_text("mine")
    arguments = ["--keep", 0.5, "--criterion", "random", "--seed", 3]
    assert "mask.json is there already; choose another name" in refused("select", tmp_path / "no-model", file, *arguments)
    assert file.read_text() == "mine"
    call("select", home / "bert", file, *arguments, "--force")
    assert liar.Mask.load(file) == liar.select(liar.load(home / "bert"), keep=0.5, criterion="random", seed=3)


def test_reconstruct_with_lists_of_kept_indices(home, tmp_path):
    (tmp_path / "mask.json").write_text(json.dumps({"heads": [[0, 2], [1], [0, 1, 2, 3]]}))
    call(
        "reconstruct", home / "bert", tmp_path / "slim", "--mask", tmp_path / "mask.json", "--calib", home / "texts.txt",
        "--dtype", "bfloat16",
    )  # fmt: skip
    slim = liar.load(tmp_path / "slim")
    assert slim.dtype == torch.bfloat16
    assert [layer.attention.self.num_attention_heads for layer in slim.bert.encoder.layer] == [2, 1, 4]


@pytest.mark.parametrize(("model", "weights"), [("llama", "host"), ("bert", "disk")])
def test_weights_outside_of_the_device(home, tmp_path, model, weights):
    """The same bits; its own folder can be read in the same way, and replayed."""
    pytest.importorskip("accelerate")
    options = ("--keep", 0.6, "--calib", home / "texts.txt", "--tokens", 300, "--criterion", "magnitude")
    source, before = home / model, set(Path(tempfile.gettempdir()).glob("liar-offload-*"))
    for number in ("first", "second"):
        whole, parts = tmp_path / f"{number}-whole", tmp_path / f"{number}-parts"
        call("prune", source, whole, *options)
        call("prune", source, parts, *options, "--weights", weights)
        assert_same_result(whole, parts)
        assert {path.name for path in whole.iterdir()} == {path.name for path in parts.iterdir()}
        source = parts
    call("replay", parts / "run.json", "--out", tmp_path / "again")
    assert_same_result(parts, tmp_path / "again")
    gc.collect()
    assert set(Path(tempfile.gettempdir()).glob("liar-offload-*")) <= before


@pytest.mark.parametrize("weights", ["host", "disk"])
def test_other_commands_with_weights_outside_of_the_device(home, writer, tmp_path, weights):
    pytest.importorskip("accelerate")
    own, llama = tmp_path / "own.jsonl", home / "llama"
    call("calibrate", writer, "--tokens", 40, "--max-length", 12, "--language", "off", "--out", own, "--weights", weights)
    call("calibrate", writer, "--tokens", 40, "--max-length", 12, "--language", "off", "--out", tmp_path / "whole.jsonl")
    assert own.read_text() == (tmp_path / "whole.jsonl").read_text()
    mask, options = tmp_path / "mask.json", ("--calib", home / "texts.txt", "--tokens", 300, "--weights", weights)
    call("select", llama, mask, "--keep", 0.6, *options)
    call("reconstruct", llama, tmp_path / "slim", "--mask", mask, *options)
    call("refine", tmp_path / "slim", tmp_path / "refined", "--teacher", llama, "--epochs", 1, *options)
    gradients = refused("select", llama, tmp_path / "other.json", "--keep", 0.6, "--criterion", "snip", *options)
    assert "choose another criterion: reconstruction, fluctuation" in gradients
    assert "accelerate keeps some elsewhere" in refused("latency", llama, tmp_path / "t.json", "--length", 8, *options[-2:])


def test_offloading_needs_accelerate(home, tmp_path, monkeypatch):
    monkeypatch.setattr("liar.cli.run.find_spec", lambda name: None)
    message = refused(
        "prune", home / "bert", tmp_path / "slim", "--keep", 0.5, "--calib", home / "texts.txt", "--weights", "disk"
    )
    assert 'pip install "liar-prune[offload]"' in message


def test_a_run_from_before_there_was_offloading(home, tmp_path):
    call("prune", home / "bert", tmp_path / "slim", "--keep", 0.5, "--calib", home / "texts.txt", "--criterion", "magnitude")
    run = json.loads((tmp_path / "slim" / "run.json").read_text())
    del run["run"]["load"]["weights"]
    assert Run.from_json(json.dumps(run)).load.weights == "device"


def test_replay_gives_the_same_bits(home, tmp_path):
    """With an option of every group that is not the default."""
    first, again = tmp_path / "first", tmp_path / "again"
    call(
        "prune", home / "llama", first, "--keep", 0.5, "--calib", home / "texts.jsonl.gz", "--column", "body",
        "--criterion", "random", "--seed", 3, "--protect", "heads.0", "--max-length", 7, "--pack", "--dtype", "bfloat16",
        "--no-refit", "--ridge", 0.01,
    )  # fmt: skip
    run = json.loads((first / "run.json").read_text())["run"]
    assert run["source"] == {"calib": str(home / "texts.jsonl.gz"), "config": None, "split": "train", "column": "body"}
    selection = {
        "keep": 0.5,
        "criterion": "random",
        "budget": "params",
        "widths": "free",
        "round_to": 1,
        "seed": 3,
        "heads": "group",
    }
    assert run["select"] == {**selection, "protect": ["heads.0"]}
    assert (run["calibration"]["max_length"], run["calibration"]["pack"]) == (7, True)
    assert (run["reconstruct"]["refit"], run["reconstruct"]["ridge"]) == (False, 0.01)
    assert run["load"] == {"dtype": "bfloat16", "device": "cpu", "weights": "device"}
    assert run["mask"] is None
    text = (first / "run.json").read_text()
    assert Run.from_json(text) == Run.from_json(Run.from_json(text).to_json())
    call("replay", first / "run.json", "--out", again)
    assert_same_result(first, again)
    moved = json.loads((again / "run.json").read_text())["run"]
    assert moved == {**json.loads((first / "run.json").read_text())["run"], "out": str(again)}
    assert "is there already" in refused("replay", first / "run.json")
    call("replay", first / "run.json", "--force")
    assert_same_result(first, again)


def test_standalone_folders(home, tmp_path):
    call("prune", home / "llama", tmp_path / "first", "--keep", 0.5, "--calib", home / "texts.txt", "--standalone")
    call("replay", tmp_path / "first" / "run.json", "--out", tmp_path / "again")
    (tmp_path / "mask.json").write_text(json.dumps({"neurons.0": [1, 2]}))
    reconstruct = ["--mask", tmp_path / "mask.json", "--calib", home / "texts.txt", "--standalone"]
    call("reconstruct", home / "llama", tmp_path / "other", *reconstruct)
    for name in ("first", "again", "other"):
        remote = AutoModel.from_pretrained(tmp_path / name, trust_remote_code=True)
        torch.testing.assert_close(remote.state_dict(), liar.load(tmp_path / name).model.state_dict(), rtol=0, atol=0)
    card = (tmp_path / "first" / "README.md").read_text()
    assert "criterion of the selection: `reconstruction`" in card
    # A run.json of an earlier version does not say how the model is saved.
    content = json.loads((tmp_path / "first" / "run.json").read_text())
    assert content["run"].pop("save") == {"standalone": True}
    assert Run.from_json(json.dumps(content)).save == SaveOptions(standalone=False)


def test_replay_needs_no_mask_file(home, tmp_path):
    (tmp_path / "mask.json").write_text(json.dumps({"neurons": [list(range(20))] * 3}))
    arguments = ["--mask", tmp_path / "mask.json", "--calib", home / "texts.txt"]
    call("reconstruct", home / "bert", tmp_path / "first", *arguments)
    (tmp_path / "mask.json").unlink()
    call("replay", tmp_path / "first" / "run.json", "--out", tmp_path / "again")
    assert_same_result(tmp_path / "first", tmp_path / "again")


@pytest.mark.parametrize("texts", ["texts.jsonl", "texts.jsonl.gz", "data"])
def test_all_kinds_of_texts_give_the_same(home, pruned, tmp_path, texts):
    call("prune", home / "bert", tmp_path / "other", "--keep", 0.5, "--calib", home / texts)
    assert_same_result(pruned, tmp_path / "other")


def test_a_budget_in_time_is_measured_once_and_replayed(home, tmp_path, monkeypatch):
    timing = import_module("liar.selection.budget.latency")
    monkeypatch.setattr(timing, "ROUNDS", 3)
    monkeypatch.setattr(timing, "SECONDS", 0.001)
    file = tmp_path / "latency.json"
    printed = call("latency", home / "llama", file, "--batch-size", 2, "--length", 8).stdout
    assert re.search(r"\d+\.\d ms per batch; written to", printed)
    again = ["latency", home / "llama", file, "--batch-size", 1, "--length", 4]
    assert "latency.json is there already; choose another name, or allow to replace a file (--force)" in refused(*again)
    assert "there is no folder" in refused("latency", home / "llama", tmp_path / "none" / "latency.json")
    costs = liar.Costs.load(file)
    assert (costs.about["batch_size"], costs.about["length"]) == (2, 8)
    arguments = ["--calib", home / "texts.txt", "--budget", file, "--protect", "heads.0", "--protect", 1]
    # How much of its time a tiny model can do without is chance; half-way to it is always possible.
    least = costs.fixed + min(costs.sites["neurons.0"].values())
    keep = (least + costs.dense) / 2 / costs.dense
    call("prune", home / "llama", tmp_path / "first", "--keep", keep, *arguments)
    mask = liar.Mask.load(tmp_path / "first" / "mask.json")
    assert all(mask.keeps_all(name) for name in ("heads.0", "heads.1", "neurons.1"))
    assert costs.of({name: mask.kept(name) for name in mask.masks}) <= keep * costs.dense
    call("select", home / "llama", tmp_path / "mask.json", "--keep", keep, *arguments)
    assert liar.Mask.load(tmp_path / "mask.json") == mask
    call(*again, "--force")
    assert liar.Costs.load(file).about["batch_size"] == 1
    file.unlink()
    call("replay", tmp_path / "first" / "run.json", "--out", tmp_path / "again")
    assert_same_result(tmp_path / "first", tmp_path / "again")


def test_uniform_and_rounded_widths(home, tmp_path):
    arguments = ["--keep", 0.9, "--calib", home / "texts.txt", "--widths", "uniform", "--round-to", 8, "--budget", "flops"]
    call("prune", home / "bert", tmp_path / "slim", *arguments)
    mask = liar.Mask.load(tmp_path / "slim" / "mask.json")
    (width,) = {mask.kept(name) for name in mask.masks if name.startswith("neurons")}
    assert width % 8 == 0
    assert all(mask.keeps_all(name) for name in mask.masks if name.startswith("heads"))
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "slim").config.intermediate_size == width


def test_relative_paths_replay_from_anywhere(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    call("prune", "bert", tmp_path / "one", "--keep", 0.5, "--calib", "texts.txt")
    monkeypatch.chdir(tmp_path)
    call("replay", "one/run.json", "--out", "two")
    assert_same_result(tmp_path / "one", tmp_path / "two")


def test_refuses_to_overwrite_before_anything_is_loaded(home, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text('{"model_type": "bert"}')
    # Neither the model nor the texts are there: the refusal comes first.
    arguments = ["prune", tmp_path / "no-model", tmp_path / "full", "--keep", 0.5, "--calib", tmp_path / "no-texts.txt"]
    assert f"{tmp_path / 'full'} is there already and not empty" in refused(*arguments)
    assert (tmp_path / "full" / "config.json").read_text() == '{"model_type": "bert"}'
    call("prune", home / "bert", tmp_path / "full", "--keep", 0.5, "--calib", home / "texts.txt", "--force")
    assert liar.load(tmp_path / "full").num_parameters() > 0


def test_force_does_not_reach_folders_that_are_no_models(home, tmp_path):
    (tmp_path / "thesis.txt").write_text("three years")
    arguments = ["prune", home / "bert", tmp_path, "--keep", 0.5, "--calib", home / "texts.txt", "--force"]
    assert "expected a model folder" in refused(*arguments)
    assert (tmp_path / "thesis.txt").exists()


def test_out_must_not_be_the_model(home):
    arguments = ["prune", home / "bert", home / "bert", "--keep", 0.5, "--calib", home / "texts.txt", "--force"]
    assert "OUT is the folder of MODEL" in refused(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "nowhere"}, r"nowhere: expected a model folder, got nothing there; check the path"),
        ({"--calib": "nowhere.txt"}, r"nowhere.txt'?: expected a file with texts, there is none; check the path"),
        ({"--calib": "empty.txt"}, r"no calibration text: expected at least one non-empty string"),
        ({"--calib": "broken.jsonl"}, r"datasets cannot read it"),
        ({"--calib": "texts.jsonl", "--column": "title"}, r"expected a column 'title' with texts, got text, body"),
        ({"--calib": "notes.md"}, r"expected a file that ends in .txt, .jsonl, .* rename or convert the file"),
        ({"--budget": "notes.md"}, r"notes.md: expected costs as Costs.save or `liar latency` writes them"),
        ({"--protect": "heads.7"}, r"no such site or layer: 'heads.7'"),
        ({"--device": "warp"}, r"device='warp': expected one torch can use here"),
    ],
)
def test_unusable_input(home, tmp_path, change, message):
    (home / "empty.txt").write_text("\n\n")
    (home / "broken.jsonl").write_text('{"text": "a"\n{')
    (home / "notes.md").write_text("# notes")
    options = {"model": "bert", "--keep": 0.5, "--calib": "texts.txt", **change}
    options |= {name: home / options[name] for name in ("model", "--calib", "--budget") if name in options}
    model = options.pop("model")
    flat = [part for option in options.items() for part in option]
    assert re.search(message, refused("prune", model, tmp_path / "slim", *flat))
    assert not (tmp_path / "slim").exists()


def test_unusable_masks(home, tmp_path):
    file = tmp_path / "mask.json"
    arguments = ["reconstruct", home / "bert", tmp_path / "slim", "--mask", file, "--calib", home / "texts.txt"]
    for text, message in [
        ("no json", "expected a JSON file with a mask"),
        ("[1, 2]", "a JSON object, got a list"),
        ('{"mask": {"heads.0": 3}}', 'expected a JSON with {"mask"'),
        ('{"heads": [[0], [1]]}', "expected one row for each of 3 layers, got 2"),
        ('{"heads.7": [0]}', "no such site in this model"),
        ('{"heads.0": []}', "nothing is kept"),
    ]:
        file.write_text(text)
        assert message in refused(*arguments)


def test_unusable_run_json(tmp_path):
    flat = {"command": "prune", "model": "bert", "out": "slim", "calib": "texts.txt", "keep": 0.5}
    half = {"command": "prune", "model": "bert", "out": "slim", "source": {"calib": "texts.txt"}, "select": {"keep": 0.5}}
    nothing = {**half, "calibration": {}, "load": {}, "reconstruct": None}
    unknown = {**half, "calibration": {"colour": 3}, "load": {}, "reconstruct": {}}
    runs = [{"command": "prune", "colour": 3}, flat, half, nothing, {**nothing, "reconstruct": 3}, unknown]
    for text in ("no json", "{}", *(json.dumps({"run": run}) for run in runs)):
        (tmp_path / "run.json").write_text(text)
        assert "expected a run.json with" in refused("replay", tmp_path / "run.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"select": {"keep": 0}}, "keep=0: expected the share that stays, above 0 and at most 1"),
        ({"select": {"keep": None}}, "keep=None"),
        ({"select": {"keep": 0.5, "criterion": "luck"}}, "criterion='luck' is not known; expected one of"),
        ({"select": {"keep": 0.5, "widths": "any"}}, "widths='any' is not known; expected one of"),
        ({"select": {"keep": 0.5, "round_to": 0.5}}, "round_to=0.5: expected a whole number, at least 1"),
        (
            {"select": {"keep": 0.5, "budget": "time"}},
            "budget='time' is not known; expected one of 'params', 'flops', 'latency'",
        ),
        ({"select": {"keep": 0.5, "budget": {"name": "time"}}}, "expected costs as Costs.save"),
        ({"select": None}, "command='prune': expected options that select units and no mask, got neither"),
        ({"mask": {"heads.0": [0]}}, "command='prune': expected options that select units and no mask, got select and mask"),
        ({"teacher": {"teacher": 3}}, "teacher=3: expected a text"),
        ({"stepping": {"steps": 0}}, "steps=0: expected a whole number"),
        ({"command": "refine", "refine": {}}, "command='refine': expected the dense model as a teacher"),
        ({"command": "refine", "select": None, "refine": {"epochs": 0}}, "epochs=0: expected a whole number"),
        ({"load": {"dtype": "int8"}}, "dtype='int8' is not known; expected one of 'auto', 'float32'"),
        ({"load": {"device": "warp"}}, "device='warp': expected one torch can use here"),
        ({"reconstruct": {"ridge": -1}}, "ridge=-1: expected"),
        ({"reconstruct": {"ridge": "much"}}, "ridge='much': expected"),
        ({"reconstruct": {"solver": "qr"}}, "solver='qr' is not known; expected one of"),
        ({"calibration": {"tokens": 0}}, "tokens=0: expected a whole number, at least 1"),
        ({"command": "grow"}, "command='grow' is not known"),
        ({"command": "reconstruct", "select": None}, "command='reconstruct': expected a mask and no options that select"),
        ({"command": "reconstruct", "mask": {"heads.0": [0]}}, "command='reconstruct': expected a mask and no options"),
        ({"command": "reconstruct", "select": None, "mask": [0]}, "a JSON object, got a list"),
        ({"save": {"standalone": "maybe"}}, "standalone='maybe': expected True or False"),
        ({"save": None}, "expected a run.json with"),
        ({"model": 3}, "model=3: expected a text, got a int"),
    ],
)
def test_a_run_json_is_checked_like_options(home, tmp_path, change, message):
    run = {
        "command": "prune", "model": "nowhere", "out": str(tmp_path / "slim"), "source": {"calib": str(home / "texts.txt")},
        "select": {"keep": 0.5}, "reconstruct": {}, "calibration": {}, "load": {},
    }  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps({"run": {**run, **change}}))
    assert message in refused("replay", tmp_path / "run.json")


SOURCE = (SourceOptions, CalibrationOptions, LoadOptions)
GROUPS = {
    "prune": (SelectOptions, PruneOptions, ReconstructOptions, *SOURCE, RunOptions, SaveOptions),
    "reconstruct": (ReconstructOptions, TeacherOptions, *SOURCE, RunOptions, SaveOptions),
    "refine": (TeacherOptions, RefineOptions, *SOURCE, SaveOptions),
    "select": (SelectOptions, *SOURCE, RunOptions),
    "latency": (LoadOptions,),
    "plan": (SelectOptions, ReconstructOptions, PlanOptions, LoadOptions),
    "calibrate": (GenerateOptions, LoadOptions),
}
# A value of every option that is refused as wrong usage ...
WRONG = {
    "keep": ["0", "1.5", "half", "nan"],
    "criterion": ["luck"],
    "budget": ["time"],
    "widths": ["any"],
    "heads": ["queries"],
    "round_to": ["0", "x"],
    "seed": ["x"],
    "target": ["dense"],
    "ridge": ["-1", "nan", "inf", "much"],
    "solver": ["qr"],
    "bias": ["keep"],
    "quality": ["-1", "many", "1.5"],
    "max_length": ["0"],
    "batch_size": ["0"],
    "tokens": ["0"],
    "dtype": ["int8"],
    "weights": ["gpu"],
    "steps": ["0", "x"],
    "activations": ["gpu"],
    "granularity": ["row", "0"],
    "propagation": ["both"],
    "epochs": ["0"],
    "sequences": ["0"],
    "learning_rate": ["0", "2"],
    "warmup": ["-1", "2"],
    "patience": ["0"],
    "lora": ["0", "x"],
}
# ... but for switches, which have no value, and for what only the model or the data can refuse.
SWITCHES = {"refit", "set_aside", "pack", "mixed_lengths", "standalone", "offload", "measure"}
UNCHECKED = {"protect", "calib", "config", "split", "column", "device", "language", "teacher", "run_folder"}


def flag(name):
    return f"--{name.replace('_', '-')}"


@pytest.mark.parametrize("command", GROUPS)
def test_options_of_a_command_are_those_of_the_library(command):
    """Flags, defaults and help come from `liar.options`, and all of it is shown."""
    shown = plain(call(command, "--help").stdout)
    parameters = {parameter.name: parameter for parameter in get_command(app).commands[command].params}
    for each, option in options_in(*GROUPS[command]):
        parameter = parameters[each.name]
        assert flag(each.name) in parameter.opts
        assert parameter.help.startswith(option.help)
        for choice in option.choices or ():
            assert choice in parameter.help
        assert flag(each.name) in shown
        assert option.help in shown
        optional = (command, each.name) == ("select", "calib")
        assert parameter.required is (each.default is MISSING and not optional)
        assert parameter.secondary_opts == ([f"--no-{flag(each.name)[2:]}"] if each.name in SWITCHES else [])


def test_every_option_is_refused_somewhere():
    names = {each.name for command in GROUPS for each, _ in options_in(*GROUPS[command])}
    assert names == WRONG.keys() | SWITCHES | UNCHECKED


@pytest.mark.parametrize(
    ("command", "name"),
    [(command, each.name) for command in GROUPS for each, _ in options_in(*GROUPS[command]) if each.name not in UNCHECKED],
)
def test_a_bad_value_is_wrong_usage(home, tmp_path, command, name):
    needed = {"prune": {"--keep": 0.5}, "select": {"--keep": 0.5}, "reconstruct": {"--mask": home / "texts.txt"}}.get(
        command, {}
    )
    needed |= {"--keep": 0.5} if command == "plan" else {}
    needed |= {"--calib": home / "texts.txt"} if command not in ("latency", "calibrate", "plan") else {}
    needed |= {"--tokens": 9} if command in ("calibrate", "plan") else {}
    out = {"calibrate": ["--out", tmp_path / "out"], "plan": []}.get(command, [tmp_path / "out"])
    bad = [[flag(name), value] for value in WRONG[name]] if name in WRONG else [[f"{flag(name)}=maybe"]]
    for wrong in bad:
        rest = [part for option, value in needed.items() if option != flag(name) for part in (option, value)]
        done = call(command, home / "bert", *out, *rest, *wrong, code=2)
        assert flag(name) in plain(done.stderr)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [["--keep", "0.5", "--colour", "red"], [], ["--keep", "0.5", "another"]])
def test_wrong_usage_ends_with_2(home, tmp_path, wrong):
    done = call("prune", home / "bert", tmp_path / "slim", "--calib", home / "texts.txt", *wrong, code=2)
    assert "Usage" in done.stderr


def test_repair_of_a_model_that_was_cut_elsewhere(home, pruned, tmp_path):
    """The folder of a slim model, without its mask: repaired against the dense one, and the run can be repeated."""
    options = ["--teacher", home / "bert", "--calib", home / "texts.txt"]
    call("reconstruct", pruned, tmp_path / "repaired", *options)
    assert {each.name for each in (tmp_path / "repaired").iterdir()} >= WRITTEN - {"mask.json"}
    assert not (tmp_path / "repaired" / "mask.json").exists()
    call("replay", tmp_path / "repaired" / "run.json", "--out", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "repaired" / "model.safetensors").read_bytes()
    assert "expected a mask" in refused("reconstruct", pruned, tmp_path / "none", "--calib", home / "texts.txt")
    assert "OUT is the folder of the teacher" in refused("reconstruct", pruned, home / "bert", *options, "--force")


def test_refine(home, pruned, tmp_path):
    options = ["--teacher", home / "bert", "--calib", home / "texts.txt", "--epochs", 1, "--granularity", 2]
    done = call("refine", pruned, tmp_path / "refined", *options)
    assert "window.0" in done.stdout
    report = liar.Report.load(tmp_path / "refined" / "report.json")
    assert report.options["granularity"] == 2
    assert "repair: granularity `2`" in (tmp_path / "refined" / "README.md").read_text()
    call("replay", tmp_path / "refined" / "run.json", "--out", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "refined" / "model.safetensors").read_bytes()
    assert "expected the dense model as a teacher" in refused(
        "refine", pruned, tmp_path / "none", "--calib", home / "texts.txt"
    )


def test_prune_in_steps(home, tmp_path):
    call("prune", home / "llama", tmp_path / "slim", "--keep", 0.5, "--steps", 2, "--calib", home / "texts.txt")
    mask, slim = liar.Mask.load(tmp_path / "slim" / "mask.json"), liar.load(tmp_path / "slim")
    dense = liar.load(home / "llama")
    liar.remove(dense, mask)
    assert [each.shape for each in dense.parameters()] == [each.shape for each in slim.parameters()]


def test_report(pruned, tmp_path):
    table = str(liar.Report.load(pruned / "report.json"))
    assert call("report", pruned).stdout.strip() == table.strip()
    pytest.importorskip("matplotlib")
    done = call("report", pruned / "report.json", "--plot", tmp_path / "slim.png")
    assert "neurons.2" in done.stdout
    assert (tmp_path / "slim.png").read_bytes().startswith(b"\x89PNG")


def test_report_of_something_else(home, tmp_path):
    assert "expected a report.json that liar wrote, got No such file or directory; check the path" in refused(
        "report", tmp_path
    )
    (tmp_path / "report.json").write_text('{"sites": 3}')
    assert "expected a report.json that liar wrote, got TypeError" in refused("report", tmp_path)


@pytest.fixture(scope="module")
def writer(home, tmp_path_factory):
    """The folder of a model whose tokenizer has an end token."""
    folder = tmp_path_factory.mktemp("writer")
    liar.load(home / "llama").save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(home / "llama")
    tokenizer.eos_token = "[EOS]"
    tokenizer.save_pretrained(folder)
    return folder


def test_calibrate_writes_texts_that_prune_reads(home, writer, tmp_path):
    own, how = tmp_path / "own.jsonl", ("--max-length", 12, "--language", "off", "--seed", 3)
    done = call("calibrate", writer, "--tokens", 600, "--out", own, *how)
    lines = own.read_text().splitlines()
    assert re.search(rf"^{len(lines)} texts with 6\d\d tokens; 0 of {len(lines)} rejected$", done.stdout, re.M)
    assert f"written to {own}" in done.stdout
    # Called again, it goes on with a file that was cut, and leaves one that is complete.
    for size in (own.stat().st_size // 2, own.stat().st_size):
        content = own.read_bytes()
        own.write_bytes(content[:size])
        call("calibrate", writer, "--tokens", 600, "--out", own, *how)
        assert own.read_bytes() == content
    call("prune", writer, tmp_path / "slim", "--keep", 0.5, "--calib", own, "--criterion", "wanda")
    assert liar.Report.load(tmp_path / "slim" / "report.json").sequences == len(lines)
    # A pruned model writes, too.
    call("calibrate", tmp_path / "slim", "--tokens", 100, "--out", tmp_path / "slim.jsonl", *how)


def test_what_calibrate_refuses(home, writer, tmp_path):
    own, how = tmp_path / "own.jsonl", ("--tokens", 100, "--language", "off")
    assert "cannot write texts: expected a causal language model" in refused("calibrate", home / "bert", "--out", own, *how)
    assert "the tokenizer has no end token" in refused("calibrate", home / "llama", "--out", own, *how)
    assert "there is no folder" in refused("calibrate", writer, "--out", tmp_path / "none" / "own.jsonl", *how)
    assert not own.exists()
    own.write_text("notes\n")
    assert "expected texts as liar.self_generate writes them" in refused("calibrate", writer, "--out", own, *how)
    assert own.read_text() == "notes\n"


def test_families():
    lines = call("families").stdout.splitlines()
    assert [line.split()[0] for line in lines] == sorted(family.model_type for family in liar.families())


def test_every_help_has_an_example():
    for command in get_command(app).commands:
        assert f"liar {command}" in call(command, "--help").stdout


def test_console_script(home, tmp_path):
    """In a process of its own, as a user runs it."""
    arguments = ["prune", home / "llama", tmp_path / "slim", "--keep", "0.5", "--calib", home / "texts.txt"]
    # As in this process: sums are split by threads, and the results must agree bit for bit.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "liar", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    call("prune", home / "llama", tmp_path / "here", "--keep", 0.5, "--calib", home / "texts.txt")
    assert_same_result(tmp_path / "slim", tmp_path / "here")


def test_version():
    assert call("--version").stdout.startswith(f"liar {versions()['liar']} torch {torch.__version__}")


def test_the_home_folder_stands_for_the_home_folder(home, tmp_path, monkeypatch):
    """Also where the shell has not replaced it; and the model itself is no place to write to, by whatever name."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    source = ["--keep", 0.5, "--criterion", "magnitude", "--calib", home / "texts.txt"]
    call("prune", home / "bert", "~/slim", *source)
    assert (tmp_path / "slim" / "liar.json").exists()
    assert not (tmp_path / "~").exists()
    call("report", "~/slim")
    assert "OUT is the folder of MODEL" in refused("prune", "~/slim", tmp_path / "slim", *source, "--force")
    assert "OUT is the folder of MODEL" in refused("prune", tmp_path / "slim", "~/slim", *source, "--force")
