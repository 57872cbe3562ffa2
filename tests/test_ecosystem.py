"""A pruned model goes where the dense one went: auto classes, pipelines, lm-eval, sentence-transformers, the hub."""

import copy
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from base64 import b64decode
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification
from transformers.dynamic_module_utils import get_imports

import liar
from liar.data import read_by
from liar.errors import CheckpointError, ModelError
from liar.surgery import modeling_pruned
from liar.testing import tiny_batches, tiny_model

CASES = {
    "bert": {"model_type": "bert"},
    "bert-mlm": {"model_type": "bert", "head": "masked-lm"},
    "bert-classifier": {"model_type": "bert", "head": "sequence-classification", "num_labels": 3},
    "llama": {"model_type": "llama"},
    "llama-lm": {"model_type": "llama", "head": "causal-lm"},
    "llama-tied": {"model_type": "llama", "head": "causal-lm", "tie_word_embeddings": True},
    "llama-biases": {"model_type": "llama", "head": "causal-lm", "attention_bias": True, "mlp_bias": True},
    "gpt2-lm": {"model_type": "gpt2", "head": "causal-lm", "n_inner": 64},
}
AUTO = {
    None: AutoModel,
    "masked-lm": AutoModelForMaskedLM,
    "sequence-classification": AutoModelForSequenceClassification,
    "causal-lm": AutoModelForCausalLM,
}
CODE = Path(modeling_pruned.__file__)


def uneven(**case):
    """A model whose first layer is cut."""
    model = tiny_model(**case)
    liar.remove(model, {"heads.0": [1], "neurons.0": list(range(5, 40))})
    return model


def config_of(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def assert_same(one, other):
    """The same tensors and outputs, to the bit."""
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    batch = tiny_batches(one)[0]
    with torch.no_grad():
        assert torch.equal(one(**batch)[0], other(**batch)[0])


# Standalone folders.


@pytest.mark.parametrize("name", CASES)
def test_a_standalone_folder_loads_with_the_auto_class_again_and_again(name, tmp_path):
    model, auto = uneven(**CASES[name]), AUTO[CASES[name].get("head")]
    before = dict(vars(model.config))
    liar.save(model, tmp_path / "first", standalone=True)
    assert type(model) is getattr(transformers, type(model).__name__)
    assert {**vars(model.config), "architectures": None, "dtype": None} == {**before, "architectures": None, "dtype": None}
    first = auto.from_pretrained(tmp_path / "first", trust_remote_code=True)
    assert isinstance(first, type(model))
    assert type(first).__module__.startswith("transformers_modules.")
    assert not first.training
    assert_same(model, first)
    first.save_pretrained(tmp_path / "second")
    assert (tmp_path / "second" / CODE.name).read_bytes() == CODE.read_bytes()
    configs = [config_of(tmp_path / folder) for folder in ("first", "second")]
    layers = [config.pop("per_layer_config") for config in configs]
    assert configs[0] == configs[1]
    assert layers[0]["0"] == layers[1]["0"], "transformers leaves out what is as in the configuration of all layers"
    assert_same(model, auto.from_pretrained(tmp_path / "second", trust_remote_code=True))
    bare, batch = AutoModel.from_pretrained(tmp_path / "second", trust_remote_code=True), tiny_batches(model)[0]
    assert torch.equal(bare(**batch)[0], model.base_model(**batch)[0])
    for folder in ("first", "second"):
        again = liar.load(tmp_path / folder)
        assert type(again) is type(model)
        assert not {"pruned", "auto_map"} & vars(again.config).keys()
        assert_same(model, again)


@pytest.mark.parametrize("name", ["bert-mlm", "llama-tied", "gpt2-lm"])
def test_types_devices_and_the_meta_device(name, tmp_path):
    model, auto = uneven(**CASES[name]), AUTO[CASES[name]["head"]]
    liar.save(model, tmp_path, standalone=True)
    half = auto.from_pretrained(tmp_path, trust_remote_code=True, dtype=torch.bfloat16, device_map="cpu")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert_same(liar.load(tmp_path, dtype=torch.bfloat16), half)
    assert (half.get_output_embeddings().weight is half.get_input_embeddings().weight) == (name != "llama-lm")
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        built = auto.from_config(config, trust_remote_code=True)
    assert all(parameter.is_meta for parameter in built.parameters())
    shapes = [{name: value.shape for name, value in each.state_dict().items()} for each in (model, built)]
    assert shapes[0] == shapes[1]


def test_a_new_standalone_model_has_initial_weights(tmp_path):
    liar.save(uneven(**CASES["gpt2-lm"]), tmp_path, standalone=True)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    built = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    cut = built.transformer.h[0].mlp.c_fc.weight
    assert cut.shape == (32, 35)
    assert 0.01 < float(cut.detach().std()) < 0.03
    assert cut.requires_grad


def test_created_biases_are_built(tmp_path):
    model = tiny_model(**CASES["llama-lm"])
    liar.reconstruct(model, {"heads.0": [1], "neurons.1": [3, 5]}, tiny_batches(model), bias="create", progress=False)
    created = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    assert created
    liar.save(model, tmp_path, standalone=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert {name for name, _ in again.named_parameters() if name.endswith("bias")} == created
    assert_same(model, again)


def test_a_pruned_encoder_gets_a_new_head(tmp_path):
    model = uneven(**CASES["bert"])
    liar.save(model, tmp_path, standalone=True)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=True, num_labels=5)
    assert classifier.classifier.out_features == 5
    assert_same(model, classifier.bert)


def test_generation(tmp_path):
    model = uneven(**CASES["llama-lm"])
    liar.save(model, tmp_path, standalone=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    ids = torch.arange(1, 7)[None]
    assert torch.equal(*(each.generate(ids, max_new_tokens=5, do_sample=False) for each in (model, again)))


def test_where_transformers_needs_no_code_there_is_none(tmp_path):
    model = tiny_model(**CASES["llama-lm"])
    liar.remove(model, {"heads": [[0], [1]], "neurons": [list(range(9))] * 2})
    liar.save(model, tmp_path, standalone=True)
    assert not (tmp_path / CODE.name).exists()
    assert not {"pruned", "auto_map", "per_layer_config"} & config_of(tmp_path).keys()
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path))
    assert 'LlamaForCausalLM.from_pretrained("' in (tmp_path / "README.md").read_text()


def test_the_code_needs_torch_and_transformers_only():
    assert set(get_imports(CODE)) <= {"__future__", "dataclasses", "typing", "torch", "transformers"}
    assert len(CODE.read_text(encoding="utf-8").splitlines()) < 200  # people read it before they trust it
    with pytest.raises(AttributeError, match="transformers has no model of this name"):
        _ = modeling_pruned.BertTokenizer


def test_liar_load_runs_no_code_of_a_standalone_folder(tmp_path):
    model = uneven(**CASES["bert"])
    liar.save(model, tmp_path / "m", standalone=True)
    (tmp_path / "m" / CODE.name).write_text(f"{CODE.read_text()}\nopen({str(tmp_path / 'ran')!r}, 'w')\n")
    assert_same(model, liar.load(tmp_path / "m"))
    assert not (tmp_path / "ran").exists()
    AutoModel.from_pretrained(tmp_path / "m", trust_remote_code=True)
    assert (tmp_path / "ran").exists(), "it would have"


def test_a_loaded_standalone_model_can_be_cut_again(tmp_path):
    liar.save(uneven(**CASES["llama-lm"]), tmp_path / "m", standalone=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", trust_remote_code=True)
    kind, batches = type(model), tiny_batches(model)
    liar.reconstruct(model, {"neurons.1": [1, 2, 3]}, batches, progress=False)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.\w+\.\w+ is no longer 64, as config\.pruned says"):
        model.save_pretrained(tmp_path / "own")
    liar.save(model, tmp_path / "m", standalone=True)
    assert type(model) is kind
    assert config_of(tmp_path / "m")["per_layer_config"]["1"]["intermediate_size"] == 3
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "m", trust_remote_code=True))
    liar.save(model, tmp_path / "m")
    assert not (tmp_path / "m" / CODE.name).exists()
    assert not {"pruned", "auto_map"} & config_of(tmp_path / "m").keys()
    assert_same(model, liar.load(tmp_path / "m"))
    liar.make_standalone(model)
    model.save_pretrained(tmp_path / "own")
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "own", trust_remote_code=True))
    liar.save(model, tmp_path / "own")  # replaces it
    liar.remove(model, {"heads.1": [0], "neurons.0": [0, 1, 2]})
    liar.make_standalone(model)
    assert type(model) is transformers.LlamaForCausalLM, "all layers are equal now"
    model.save_pretrained(tmp_path / "even")
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "even"))


def test_make_standalone_is_for_whatever_saves(tmp_path):
    model = uneven(**CASES["bert-classifier"])
    before = model.state_dict()
    liar.make_standalone(model)
    assert isinstance(model, transformers.BertForSequenceClassification)
    assert all(value is not None and torch.equal(value, before[name]) for name, value in model.state_dict().items())
    arguments = transformers.TrainingArguments(tmp_path / "runs", report_to=[], use_cpu=True)
    transformers.Trainer(model, arguments).save_model(tmp_path / "trained")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "trained", trust_remote_code=True)
    assert_same(model, again)


def test_models_that_no_auto_class_loads(tmp_path):
    model = uneven(**CASES["gpt2-lm"])
    double = transformers.GPT2DoubleHeadsModel(model.config)
    liar.remove(double, {"neurons.0": [1]})
    before = dict(vars(double.config))
    for refused in (lambda: liar.save(double, tmp_path / "m", standalone=True), lambda: liar.make_standalone(double)):
        with pytest.raises(CheckpointError, match=r"AutoModelForCausalLM, .* none of them loads a GPT2DoubleHeadsModel: save"):
            refused()
    assert type(double) is transformers.GPT2DoubleHeadsModel
    assert vars(double.config) == before
    assert not (tmp_path / "m").exists()
    with pytest.raises(liar.LiarError, match="standalone='yes': expected True or False"):
        liar.save(model, tmp_path / "m", standalone="yes")


class WithMore(transformers.BertModel):
    """A class of the user, with a part that BERT does not have."""

    def __init__(self, config, size):
        super().__init__(config)
        self.more = torch.nn.Linear(config.hidden_size, size)

    def save_pretrained(self, folder):
        super().save_pretrained(folder)
        Path(folder, "more.txt").write_text("mine")


def test_classes_of_the_user_save_as_they_do(tmp_path):
    model = WithMore(tiny_model("bert").config, 3)
    liar.remove(model, {"neurons.0": [1]})
    with pytest.raises(CheckpointError, match="none of them loads a WithMore"):
        liar.make_standalone(model)
    liar.save(model, tmp_path)
    assert config_of(tmp_path)["architectures"] == ["WithMore"]
    assert (tmp_path / "more.txt").exists()


def test_an_error_while_saving_leaves_the_model_as_it_was(tmp_path):
    model = uneven(**CASES["bert"])
    before = dict(vars(model.config))
    with pytest.raises(CheckpointError, match=f"'{CODE.name}'.*: the model or its tokenizer has a file of this name"):
        liar.save(model, tmp_path / "m", standalone=True, extra={CODE.name: "x"})
    assert type(model) is transformers.BertModel
    assert "per_layer_config" not in vars(model)
    assert vars(model.config) == before


WITHOUT = """
import sys
class Blocked:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] == "liar":
            raise ImportError("liar is blocked")
sys.meta_path.insert(0, Blocked())
import torch, transformers
from pathlib import Path
torch.set_num_threads(1)
here = Path(sys.argv[1])
model = transformers.AutoModelForCausalLM.from_pretrained(here / "llama", trust_remote_code=True)
inputs, outputs = torch.load(here / "llama.pt")
with torch.no_grad():
    assert torch.equal(model(inputs).logits, outputs)
generate = transformers.pipeline("text-generation", str(here / "llama"), trust_remote_code=True)
text = generate("w1 w2", max_new_tokens=5, do_sample=False)[0]["generated_text"]
from sentence_transformers import CrossEncoder, SentenceTransformer
texts, pairs, embeddings, scores = torch.load(here / "sentences.pt", weights_only=False)
assert (SentenceTransformer(str(here / "minilm"), trust_remote_code=True).encode(texts) == embeddings).all()
assert (CrossEncoder(str(here / "pairs"), trust_remote_code=True).predict(pairs) == scores).all()
print(type(generate.model).__name__, text)
try:
    import liar
except ImportError:
    print("without liar")
"""


def test_lm_eval_loads_a_standalone_folder(tmp_path, plain_tokenizer):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    tokenizer = copy.deepcopy(plain_tokenizer)
    tokenizer.eos_token = "[SEP]"
    liar.save(uneven(**CASES["llama-lm"]), tmp_path / "llama", tokenizer=tokenizer, standalone=True)
    requests = [instance("loglikelihood", {}, ("w1 w2", " w3 w4"), 0)]
    remote = huggingface.HFLM(pretrained=str(tmp_path / "llama"), trust_remote_code=True, device="cpu")
    own = huggingface.HFLM(pretrained=liar.load(tmp_path / "llama"), tokenizer=tokenizer, device="cpu")
    assert type(remote.model).__module__.startswith("transformers_modules.")
    (likelihood, _), (expected, _) = (each.loglikelihood(requests)[0] for each in (remote, own))
    assert likelihood == expected < 0


# Stock classes refuse what they cannot build.


@pytest.mark.parametrize("standalone", [False, True])
@pytest.mark.parametrize("mask", [{"neurons.0": [1, 2]}, {"heads.0": [1]}, {"heads": [[0], [1]], "neurons.1": [3]}])
@pytest.mark.parametrize("name", ["bert-mlm", "llama-lm", "gpt2-lm"])
def test_ignoring_sizes_is_no_way_to_random_weights(name, mask, standalone, tmp_path):
    model = tiny_model(**CASES[name])
    liar.remove(model, mask)
    liar.save(model, tmp_path, standalone=standalone)
    for auto in (AutoModel, AUTO[CASES[name]["head"]], type(model)):
        with pytest.raises(Exception, match="is a per-layer attribute and may vary across layers"):
            auto.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert_same(model, liar.load(tmp_path, ignore_mismatched_sizes=True))
    if standalone:
        AUTO[CASES[name]["head"]].from_pretrained(tmp_path, trust_remote_code=True).save_pretrained(tmp_path)
        with pytest.raises(Exception, match="is a per-layer attribute and may vary across layers"):
            AutoModel.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


# Sentence-transformers.

TEXTS = [
    "The cat sits outside.",
    "A man is playing the guitar in the street, and people stop to listen.",
    "I love pasta.",
    "The new film is awesome, though the book it was made from is better by far.",
    "She reads.",
]
PAIRS = [(one, other) for one in TEXTS for other in TEXTS[:2]]


@pytest.fixture
def sentence_model(minilm_folder):
    """The real MiniLM, with two of its six blocks."""
    two = {"num_hidden_layers": 2}
    return pytest.importorskip("sentence_transformers").SentenceTransformer(str(minilm_folder), config_kwargs=two)


def assert_embeds(model, expected):
    assert (model.encode(TEXTS) == expected).all()


def pruned(model, **options):
    """A sentence model after pruning; the report and its embeddings."""
    more = {"keep": 0.6, "criterion": "magnitude", "ridge": 0.1, **options}
    report = liar.prune(model, TEXTS, progress=False, **more)
    return report, model.encode(TEXTS)


def test_sentence_models_are_pruned_as_the_transformer_inside(sentence_model, minilm_folder):
    inner = liar.load(minilm_folder, num_hidden_layers=2)
    before = sentence_model.encode(TEXTS)
    report, embeddings = pruned(sentence_model)
    assert report.achieved <= 0.6
    assert not (embeddings == before).all()
    assert sentence_model[0].auto_model.config.num_hidden_layers == len(liar.discover(sentence_model[0].auto_model).blocks)
    # The same batches by hand, for the transformer alone.
    ordered = sorted(TEXTS, key=len)
    batch = sentence_model.tokenizer(ordered, padding=True, return_tensors="pt")
    same = liar.prune(inner, [batch], keep=0.6, criterion="magnitude", ridge=0.1, progress=False)
    assert (same.tokens, same.sequences, same.verdicts) == (report.tokens, len(TEXTS), report.verdicts)
    for name, value in inner.state_dict().items():
        assert torch.equal(value, sentence_model[0].auto_model.state_dict()[name]), name


def test_sentence_models_take_every_verb_and_kind_of_data(sentence_model, minilm_folder):
    package = pytest.importorskip("sentence_transformers")
    first = liar.select(sentence_model, TEXTS, keep=0.5, criterion="wanda", progress=False)
    batches = [sentence_model.preprocess(sorted(TEXTS, key=len))]
    for calib in (tuple(TEXTS), iter(TEXTS), batches, liar.Calibration.of(batches, sentence_model[0].auto_model)):
        assert liar.select(sentence_model, calib, keep=0.5, criterion="wanda", progress=False) == first
    assert liar.select(sentence_model, keep=0.5, criterion="magnitude").requested == 0.5
    pairs = package.CrossEncoder(str(minilm_folder), num_labels=1, config_kwargs={"num_hidden_layers": 1})
    read = liar.reconstruct(pairs, {"heads.0": [2, 3]}, PAIRS, ridge=0.1, progress=False)
    together = pairs.preprocess(PAIRS)
    assert (read.tokens, read.sequences) == (int(together["attention_mask"].sum()), len(PAIRS))
    report = liar.reconstruct(sentence_model, {"neurons.0": list(range(700))}, TEXTS, ridge=0.1, progress=False)
    assert report.sites[1].kept == 700
    liar.remove(sentence_model, {"heads.1": [0, 1]})
    assert liar.discover(sentence_model[0].auto_model)["heads.1"].units == 2


def test_the_default_prompt_is_read_too(sentence_model):
    plain = read_by(sentence_model, TEXTS)
    sentence_model.prompts, sentence_model.default_prompt_name = {"task": "compare these: "}, "task"
    prompted = read_by(sentence_model, TEXTS)
    assert [batch["attention_mask"].sum() + 3 * len(TEXTS) for batch in plain] == [
        batch["attention_mask"].sum() for batch in prompted
    ]


def test_what_is_wrong_with_sentences_is_said(sentence_model):
    before = {name: value.clone() for name, value in sentence_model.state_dict().items()}
    for calib, message in (
        ("one text", "got strings"),
        ([], "the calibration data is empty"),
        (["a text", 3], "expected strings, or pairs of strings, that the SentenceTransformer reads, got"),
    ):
        with pytest.raises(liar.LiarError, match=message):
            liar.prune(sentence_model, calib, keep=0.5, progress=False)
    with pytest.raises(ModelError, match=r"got a SentenceTransformer: pass the transformer inside it: model\[0\]\.auto_model"):
        liar.discover(sentence_model)
    two = torch.nn.Sequential(
        sentence_model, type(sentence_model)(modules=[type(sentence_model[0])(sentence_model[0].config.name_or_path)])
    )
    with pytest.raises(ModelError, match="the Sequential has 2 transformers inside"):
        liar.prune(two, TEXTS, keep=0.5, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in sentence_model.state_dict().items())


def test_even_sentence_models_are_saved_for_their_own_class(sentence_model, tmp_path):
    kind = type(sentence_model)
    report, embeddings = pruned(sentence_model, widths="uniform", keep=0.7)
    liar.save(sentence_model, tmp_path / "ours", report=report)
    sentence_model.save_pretrained(str(tmp_path / "theirs"))
    for folder in ("ours", "theirs"):
        assert_embeds(kind(str(tmp_path / folder)), embeddings)
    assert {"1_Pooling/config.json", "modules.json", "README.md"} <= set(
        json.loads((tmp_path / "ours" / "liar.json").read_text())["files"]
    )
    liar.save(sentence_model, tmp_path / "ours")  # replaces it, with the folders in it
    (tmp_path / "ours" / "1_Pooling" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="that also holds 1_Pooling"):
        liar.save(sentence_model, tmp_path / "ours")


def test_standalone_models_load_without_this_library(minilm_folder, tmp_path, plain_tokenizer):
    """A LLaMA, and the whole MiniLM, as two classes of sentence-transformers."""
    package = pytest.importorskip("sentence_transformers")
    kind = package.SentenceTransformer
    model, pairs = kind(str(minilm_folder)), package.CrossEncoder(str(minilm_folder), num_labels=1)
    for each, name in ((model, "minilm"), (pairs, "pairs")):
        liar.remove(each, liar.select(each, keep=0.6, criterion="magnitude"))
        liar.save(each, tmp_path / name, standalone=True)
    embeddings = model.encode(TEXTS)
    torch.save((TEXTS, PAIRS, embeddings, pairs.predict(PAIRS)), tmp_path / "sentences.pt")
    llama = uneven(**CASES["llama-lm"], eos_token_id=None)
    liar.save(llama, tmp_path / "llama", tokenizer=plain_tokenizer, standalone=True)
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        torch.save((ids, llama(ids).logits), tmp_path / "llama.pt")
    generate = transformers.pipeline("text-generation", llama, tokenizer=plain_tokenizer)
    text = generate("w1 w2", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert len(text.split()) > 2
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", WITHOUT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == [f"LlamaForCausalLM {text}", "without liar"]
    # What sentence-transformers writes after that, and what reads it.
    again = kind(str(tmp_path / "minilm"), trust_remote_code=True)
    again.save_pretrained(str(tmp_path / "again"))
    assert_embeds(kind(str(tmp_path / "again"), trust_remote_code=True), embeddings)
    again[0].model = liar.load(tmp_path / "again")
    assert_embeds(again, embeddings)
    with pytest.raises(Exception, match="is a per-layer attribute and may vary across layers"):
        kind(str(tmp_path / "again"), model_kwargs={"ignore_mismatched_sizes": True})


def test_what_sentence_transformers_saves_of_an_uneven_model(sentence_model, tmp_path):
    kind = type(sentence_model)
    _, embeddings = pruned(sentence_model)
    sentence_model.save_pretrained(str(tmp_path / "plain"))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        kind(str(tmp_path / "plain"))
    liar.make_standalone(sentence_model)
    sentence_model.save_pretrained(str(tmp_path / "standalone"))
    assert_embeds(kind(str(tmp_path / "standalone"), trust_remote_code=True), embeddings)
    for folder in ("plain", "standalone"):
        sentence_model[0].model = liar.load(tmp_path / folder)
        assert_embeds(sentence_model, embeddings)


# Model cards.

BASE_CARD = """---
license: cc-by-4.0
language: en
datasets: [me/some-texts]
base_model: me/grandparent
library_name: something-else
---

# A model
"""


def code_in(card):
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return code


@pytest.mark.parametrize(("name", "standalone"), [("bert", False), ("llama-lm", False), ("llama-lm", True)])
@pytest.mark.parametrize("widths", ["uniform", "free"])
def test_the_card_says_what_the_model_is_and_how_to_load_it(name, standalone, widths, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    liar.save(tiny_model(**CASES[name]), "base", extra={"README.md": BASE_CARD})
    model = liar.load("base")
    report = liar.prune(model, tiny_batches(model), keep=0.8, criterion="wanda", widths=widths, progress=False)
    liar.save(model, "slim", report=report, standalone=standalone)
    card = ModelCard.load("slim/README.md")
    data = card.data.to_dict()
    assert data.pop("tags") == ["liar", "pruned", "structured-pruning"]
    assert data == {
        "base_model": "me/grandparent",
        "datasets": ["me/some-texts"],
        "language": "en",
        "library_name": "transformers",
        "license": "cc-by-4.0",
    }
    before, after = report.parameters
    for fact in (
        f"{after:,} (before: {before:,})",
        "`wanda`",
        f"`{widths}`",
        f"{report.achieved:.1%} kept (80.0%",
        "`damped_stream`",
    ):
        assert fact in card.text
    assert f"{report.tokens:,} tokens in {report.sequences:,} sequences" in card.text
    assert str(tmp_path) not in card.content
    assert "README.md" in json.loads(Path("slim/liar.json").read_text())["files"]
    names = {}
    exec(code_in(card.content), names)
    assert_same(model, names["model"])
    assert ("import liar" in card.content) == (widths == "free" and not standalone)
    # The card of a pruned model is the card of a base, too.
    liar.save(names["model"], "slim")
    assert ModelCard.load("slim/README.md").data.license == "cc-by-4.0"


def test_what_is_not_known_is_not_on_the_card(tmp_path):
    model = tiny_model("bert")
    liar.save(model, tmp_path / "m")
    data = ModelCard.load(tmp_path / "m" / "README.md").data.to_dict()
    assert data == {"library_name": "transformers", "tags": ["liar"]}, "not that it is pruned, either"
    for damaged in ("---\nlicense: [\n---\n", "no entries", "---\n- a\n---\n"):
        liar.save(model, tmp_path / "m", extra={"README.md": damaged})
        assert (tmp_path / "m" / "README.md").read_text() == damaged
        liar.save(liar.load(tmp_path / "m"), tmp_path / "other")
        assert ModelCard.load(tmp_path / "other" / "README.md").data.license is None


def test_the_card_names_a_base_on_the_hub(tmp_path, monkeypatch):
    """Out of a cache as the hub's client lays it out, so that no network is needed."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    repository = tmp_path / "models--me--base"
    liar.save(tiny_model("bert"), repository / "snapshots" / "0123", extra={"README.md": BASE_CARD})
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    model = tiny_model("bert")
    for name, base in (
        ("me/base", "me/base"),
        ("me/other", None),
        ("no name", None),
        (str(tmp_path / "gone"), None),
        ("n" * 5000, None),
    ):
        model.name_or_path = name
        liar.save(model, tmp_path / "m")
        data = ModelCard.load(tmp_path / "m" / "README.md").data
        assert (data.base_model, data.license) == (base, base and "cc-by-4.0")


def test_the_card_of_a_sentence_model(sentence_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    liar.remove(sentence_model, {"neurons.0": list(range(100))})
    liar.save(sentence_model, "slim", standalone=True)
    card = ModelCard.load("slim/README.md")
    assert (card.data.library_name, card.data.license) == ("sentence-transformers", "apache-2.0")
    assert "ms_marco" in card.data.datasets
    names = {}
    exec(code_in(card.content), names)
    assert_embeds(names["model"], sentence_model.encode(TEXTS))


# The hub.


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as an upload needs; keeps the files of the commit."""

    files: dict

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        here = f"http://127.0.0.1:{self.server.server_port}/me/slim"
        if self.path == "/api/repos/create":
            answer = {"url": here}
        elif self.path == "/api/validate-yaml":
            answer = {"errors": [], "warnings": []}
        elif "/preupload/" in self.path:
            answer = {
                "files": [
                    {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                    for each in json.loads(body)["files"]
                ]
            }
        else:
            assert self.path.startswith("/api/models/me/slim/commit/main"), self.path
            lines = [json.loads(line) for line in body.splitlines()]
            self.server.files = {
                line["value"]["path"]: b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
            }
            answer = {"commitUrl": f"{here}/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_folder_on_the_hub_is_complete(hub, tmp_path):
    model = uneven(**CASES["bert"])
    liar.save(model, tmp_path / "slim", standalone=True)
    api = HfApi(endpoint=f"http://127.0.0.1:{hub.server_port}", token="hf_none")
    api.create_repo("me/slim")
    api.upload_folder(folder_path=tmp_path / "slim", repo_id="me/slim")
    assert hub.files.keys() == {path.name for path in (tmp_path / "slim").iterdir()}
    (tmp_path / "downloaded").mkdir()
    for name, content in hub.files.items():
        (tmp_path / "downloaded" / name).write_bytes(content)
    assert_same(model, AutoModel.from_pretrained(tmp_path / "downloaded", trust_remote_code=True))
    assert_same(model, liar.load(tmp_path / "downloaded"))
