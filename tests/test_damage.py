"""Damaged, foreign and hostile folders: an error that says what is wrong, and nothing of the folder ever runs."""

import copy
import io
import json
import logging
import os
import pickle
import random
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertForMaskedLM, BertForSequenceClassification, BertModel
from typer.testing import CliRunner

import liar
from liar.cli import app
from liar.errors import CheckpointError, LiarError, ModelError
from liar.io import load_tokenizer
from liar.models import layout_of
from liar.testing import tiny_batches, tiny_model

KINDS = {"bert": "sequence-classification", "gpt2": None, "llama": "causal-lm"}


def slim(kind, folder, **more):
    """A pruned model of uneven widths in a folder."""
    model = tiny_model(kind, head=KINDS[kind])
    liar.prune(model, tiny_batches(model), keep=0.6, criterion="magnitude", progress=False)
    liar.save(model, folder, **more)
    return model


def change_config(folder, **entries):
    path = Path(folder, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def change_tensors(folder, change):
    path = Path(folder, "model.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("without_record", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_any_tensor_that_is_missing_is_named(kind, without_record, tmp_path):
    """Every single one, also where another program has saved the folder."""
    slim(kind, tmp_path)
    if without_record:
        (tmp_path / "liar.json").unlink()
    whole = load_file(tmp_path / "model.safetensors")
    state = torch.get_rng_state()
    for name in whole:
        save_file({other: value for other, value in whole.items() if other != name}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=rf"missing|{name}"):
            liar.load(tmp_path)
        assert torch.equal(torch.get_rng_state(), state), "nothing random was drawn"
    save_file(whole, tmp_path / "model.safetensors")
    liar.load(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_in_the_blocks_without_a_layer(kind, tmp_path):
    slim(kind, tmp_path)
    block = layout_of(liar.load(tmp_path)).blocks[0]
    change_tensors(tmp_path, lambda tensors: tensors.update({f"{block}.adapter.weight": torch.ones(2)}))
    with pytest.raises(CheckpointError, match=rf"there is none for {block}\.adapter\.weight"):
        liar.load(tmp_path)


@pytest.mark.parametrize("number", [0, 1, 3, 100_000, 2**31, 2**64])
@pytest.mark.parametrize("kind", KINDS)
def test_another_number_of_blocks(kind, number, tmp_path):
    """Found before a model is built, however many there are to be."""
    slim(kind, tmp_path)
    change_config(tmp_path, **{"n_layer" if kind == "gpt2" else "num_hidden_layers": number})
    with pytest.raises(CheckpointError, match=f"config.json says {number} blocks, the weights have 2|cannot load"):
        liar.load(tmp_path)
    (tmp_path / "liar.json").unlink()
    with pytest.raises(CheckpointError, match=f"config.json says {number} blocks, the weights have 2|cannot load"):
        liar.load(tmp_path)


def test_fewer_blocks_on_purpose(tmp_path):
    """A number of blocks that the user names is their choice, as in `from_pretrained`; another field says nothing about it."""
    liar.save(tiny_model("bert"), tmp_path)
    (tmp_path / "liar.json").unlink()
    assert len(liar.load(tmp_path, num_hidden_layers=1).encoder.layer) == 1
    change_config(tmp_path, num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"config.json says 1 blocks, the weights have 2"):
        liar.load(tmp_path, hidden_dropout_prob=0.1)


def test_a_quantisation_of_nothing_is_none(tmp_path):
    liar.save(tiny_model("bert"), tmp_path)
    change_config(tmp_path, quantization_config=None)
    liar.load(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.pop("encoder.layer.1.output.dense.bias"))
    with pytest.raises(CheckpointError, match=r"output.dense.bias missing"):
        liar.load(tmp_path)


def test_buffers_of_earlier_versions_are_left_over(tmp_path):
    """As GPT-2 folders of other programs have them."""
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path)
    old = {f"h.{n}.attn.{name}": torch.ones(1, 1, 4, 4) for n in range(2) for name in ("bias", "masked_bias")}
    change_tensors(tmp_path, lambda tensors: tensors.update(old))
    again = liar.load(tmp_path)
    assert all(torch.equal(*pair) for pair in zip(again.parameters(), model.parameters(), strict=True))


def test_a_new_head_for_a_body_without_a_pooler(tmp_path):
    BertForMaskedLM(tiny_model("bert").config).save_pretrained(tmp_path)
    model = liar.load(tmp_path, architectures=["BertForSequenceClassification"], num_labels=3)
    assert model.classifier.out_features == 3
    with pytest.raises(CheckpointError, match="transformers has no class of this name"):
        liar.load(tmp_path, architectures=["BertForSequenceClasification"], num_labels=3)


def test_names_of_arguments_that_are_none(tmp_path):
    liar.save(tiny_model("bert"), tmp_path)
    with pytest.raises(CheckpointError, match=r"unexpected keyword argument 'num_lables'.*Check the names of the arguments"):
        liar.load(tmp_path, num_lables=3)


def test_the_record_and_the_weights_disagree(tmp_path):
    slim("bert", tmp_path / "one")
    slim("llama", tmp_path / "two")
    liar.save(tiny_model("bert", head="sequence-classification"), tmp_path / "dense")
    for source, message in (("two", "liar.json says LlamaForCausalLM"), ("dense", r"liar\.json says 4 units at heads\.0")):
        (tmp_path / "one" / "liar.json").write_text((tmp_path / source / "liar.json").read_text())
        with pytest.raises(CheckpointError, match=message):
            liar.load(tmp_path / "one")
    for text in ("", "[]", '{"sites": 3}', '{"sites": {"heads.0": 5}}', "[" * 100_000, '{"sites": {}}'):
        (tmp_path / "one" / "liar.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"liar\.json"):
            liar.load(tmp_path / "one")
    (tmp_path / "one" / "liar.json").unlink()
    liar.load(tmp_path / "one")


@pytest.mark.parametrize("where", ["../outside/model.safetensors", "/etc/passwd", "sub/model.safetensors", 5, None])
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_an_index_names_only_files_of_the_folder(where, ending, tmp_path):
    liar.save(tiny_model("bert"), tmp_path / "outside")
    liar.save(tiny_model("bert"), tmp_path / "in")
    names = list(load_file(tmp_path / "in" / "model.safetensors"))
    (tmp_path / "in" / "model.safetensors").unlink()
    name = "model.safetensors.index.json" if ending == "safetensors" else "pytorch_model.bin.index.json"
    (tmp_path / "in" / name).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, where)}))
    with pytest.raises(CheckpointError, match="expected whole weight files"):
        liar.load(tmp_path / "in")


@pytest.mark.parametrize("shards", [None, "20KB"])
def test_pickled_weights_of_a_pruned_model(shards, tmp_path):
    """As older programs write them."""
    model = slim("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = model.state_dict()
    if shards:
        parts = [dict(list(state.items())[::2]), dict(list(state.items())[1::2])]
        weight_map = {name: f"pytorch_model-{number}.bin" for number, part in enumerate(parts) for name in part}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        for number, part in enumerate(parts):
            torch.save(part, tmp_path / f"pytorch_model-{number}.bin")
    else:
        torch.save(state, tmp_path / "pytorch_model.bin")
    again = liar.load(tmp_path)
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


class Hostile:
    """Unpickled, it makes a file."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


def test_pickled_code_does_not_run(tmp_path):
    model = slim("bert", tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save({**model.state_dict(), "x": Hostile(tmp_path / "ran")}, tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="expected whole weight files"):
        liar.load(tmp_path / "m")
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Hostile(tmp_path / "ran")))
    assert (tmp_path / "ran").exists(), "negative control: it runs where it is trusted"


CODE = "open({mark!r}, 'w').write('x')\nfrom transformers import BertConfig as B, BertModel as M, BertTokenizer as T\n"


def hostile_folder(folder, mark):
    """A folder that brings code for its configuration, model and tokenizer."""
    liar.save(tiny_model("bert"), folder)
    names = {"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
    change_config(folder, model_type="evil", auto_map=names, architectures=["M"])
    Path(folder, "tokenizer_config.json").write_text(json.dumps({"auto_map": names, "tokenizer_class": "T"}))
    Path(folder, "evil.py").write_text(CODE.format(mark=str(mark)) + "class C(B): model_type = 'evil'\n")


def test_code_of_a_folder_does_not_run(tmp_path, monkeypatch):
    """Whatever stands on stdin: nothing asks."""
    mark = tmp_path / "ran"
    hostile_folder(tmp_path / "m", mark)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(CheckpointError, match="trust_remote_code"):
        liar.load(tmp_path / "m")
    with pytest.raises(CheckpointError):
        load_tokenizer(str(tmp_path / "m"))
    (tmp_path / "t.txt").write_text("a text\n")
    arguments = ["prune", str(tmp_path / "m"), str(tmp_path / "o"), "--keep", "0.5", "--calib", str(tmp_path / "t.txt")]
    result = CliRunner().invoke(app, arguments, input="y\n" * 9)
    assert result.exit_code == 1
    assert not mark.exists()
    assert not (tmp_path / "o").exists()


def test_code_of_a_known_family_does_not_run_either(tmp_path, monkeypatch):
    """Transformers has this family's classes itself; the folder's own stay unread."""
    mark = tmp_path / "ran"
    hostile_folder(tmp_path / "m", mark)
    change_config(tmp_path / "m", model_type="bert", architectures=["BertModel"])
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    assert type(liar.load(tmp_path / "m")) is BertModel
    assert not mark.exists()


@pytest.mark.parametrize("entry", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize(
    "value", ["someone/kernel", "flash_attention_2", {"": "someone/kernel"}, {"a": {"b": "someone/kernel"}}]
)
def test_kernels_that_a_configuration_names_are_not_fetched(entry, value, tmp_path):
    """A name without a slash may stand for one, too."""
    liar.save(tiny_model("bert"), tmp_path)
    change_config(tmp_path, **{entry: value})
    with pytest.raises(CheckpointError, match=f"config.json wants {entry}=.*which may be code from the hub"):
        liar.load(tmp_path)
    change_config(tmp_path, **{entry: "eager"})
    liar.load(tmp_path)


def test_adapters_are_no_models(tmp_path):
    liar.save(tiny_model("bert"), tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "/somewhere/else"}')
    with pytest.raises(CheckpointError, match="got an adapter"):
        liar.load(tmp_path)


@pytest.mark.parametrize(
    "entries",
    [
        {"hidden_act": [1]}, {"hidden_size": 31}, {"hidden_size": -1}, {"architectures": [5]}, {"architectures": "BertModel"},
        {"architectures": ["LlamaModel"]}, {"model_type": ["bert"]}, {"model_type": None}, {"dtype": "no"}, {"dtype": 3},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}}, {"layer_norm_eps": float("nan")}, {"vocab_size": 10},
        {"intermediate_size": 10**9}, {"pad_token_id": 10**69}, {"num_attention_heads": 2**31},
    ],
    ids=str,
)  # fmt: skip
def test_entries_of_the_configuration(entries, tmp_path):
    slim("bert", tmp_path)
    change_config(tmp_path, **entries)
    with pytest.raises(CheckpointError, match=r".") as caught:
        liar.load(tmp_path)
    assert 20 < len(str(caught.value)) < 2000


@pytest.mark.parametrize("name", ["x" * 5000, "", "a\0b", "\ud800", "~no-such-user/x", "./" + "d/" * 3000, 5, None, b"x"])
def test_names_that_are_none(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for call in (liar.load, lambda where: liar.save(tiny_model("bert"), where)):
        with pytest.raises(CheckpointError):
            call(name)
    assert not list(tmp_path.iterdir())


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = slim("bert", "~/deep/slim")
    assert (tmp_path / "deep" / "slim" / "liar.json").exists()
    again = liar.load("~/deep/slim")
    assert all(torch.equal(*pair) for pair in zip(again.parameters(), model.parameters(), strict=True))
    mask = liar.select(model, keep=0.9, criterion="random")
    mask.save("~/mask.json")
    assert liar.Mask.load(tmp_path / "mask.json") == mask
    assert liar.Mask.load("~/mask.json") == mask


def test_a_name_as_long_as_can_be(tmp_path):
    """The unfinished folder beside it has a name of its own."""
    target = tmp_path / ("n" * 255)
    for seed in (0, 1):
        liar.save(tiny_model("bert", seed=seed), target)
    liar.load(target)
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_another_head_may_be_asked_for(tmp_path, caplog):
    model = tiny_model("bert", head=None)
    liar.prune(model, tiny_batches(model), keep=0.5, progress=False)
    liar.save(model, tmp_path)
    with caplog.at_level(logging.WARNING, "liar"):
        headed = liar.load(tmp_path, architectures=["BertForSequenceClassification"], num_labels=7)
    assert type(headed) is BertForSequenceClassification
    assert headed.classifier.out_features == 7
    assert "new, at random values: classifier.bias, classifier.weight" in caplog.text
    body = headed.bert.state_dict()
    assert all(torch.equal(value, body[name]) for name, value in model.state_dict().items() if "pooler" not in name)
    with pytest.raises(CheckpointError, match="expected a class for a BertConfig"):
        liar.load(tmp_path, architectures=["LlamaModel"])


def test_a_part_that_the_model_does_not_have(tmp_path):
    """`add_pooling_layer=False` is in no configuration."""
    config = tiny_model("bert").config
    model = BertModel(config, add_pooling_layer=False)
    report = liar.prune(model, tiny_batches(model), keep=0.7, widths="uniform", progress=False)
    assert report.achieved <= 0.7
    liar.save(model, tmp_path)
    for again in (liar.load(tmp_path), BertModel.from_pretrained(tmp_path, add_pooling_layer=False)):
        assert again.pooler is None
        assert all(torch.equal(*pair) for pair in zip(again.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.encoder.layer.__delitem__(1), r"encoder\.layer\.1\..* is missing"),
        (lambda m: m.encoder.layer.append(tiny_model("bert").encoder.layer[0]), r"has no place|encoder\.layer\.2"),
        (lambda m: setattr(m.embeddings.word_embeddings, "weight", torch.nn.Parameter(torch.ones(50, 32))), "word_embeddings"),
        (lambda m: setattr(m.encoder.layer[0], "adapter", torch.nn.Linear(2, 2)), "adapter.* has no place"),
        (lambda m: setattr(m.config, "num_hidden_layers", 5), "is missing"),
        (lambda m: setattr(m.config, "hidden_act", "no such"), "cannot be built"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(change, message, tmp_path):
    model = tiny_model("bert")
    liar.save(model, tmp_path / "m")
    before = sorted((path.name, path.read_bytes()) for path in (tmp_path / "m").iterdir())
    change(model)
    with pytest.raises(CheckpointError, match=f"could not be loaded again.*{message}"):
        liar.save(model, tmp_path / "m")
    assert sorted((path.name, path.read_bytes()) for path in (tmp_path / "m").iterdir()) == before


def test_a_parameter_that_is_not_written_is_not_lost(tmp_path):
    """A bias that two modules share, which only tied embeddings would tie again."""
    model = BertForMaskedLM(tiny_model("bert", tie_word_embeddings=False).config)
    model.resize_token_embeddings(100)
    with pytest.raises(CheckpointError, match=r"decoder\.bias is not written by save_pretrained"):
        liar.save(model, tmp_path / "m")
    decoder = model.cls.predictions.decoder
    decoder.bias = torch.nn.Parameter(decoder.bias.detach().clone())
    liar.save(model, tmp_path / "m")
    again = liar.load(tmp_path / "m").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_saving_says_what_save_pretrained_says(tmp_path):
    model = tiny_model("llama", head="causal-lm")
    liar.save(model, tmp_path / "m")
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.6
    entries = model.config.to_dict()
    with pytest.raises(CheckpointError, match="GenerationConfig is invalid"):
        liar.save(model, tmp_path / "m")
    assert model.config.to_dict() == entries
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    liar.load(tmp_path / "m")


class Longer(BertModel):
    """A subclass whose constructor takes more than a configuration."""

    def __init__(self, config, extra):
        super().__init__(config)
        self.extra = extra


def test_a_subclass_is_saved_as_what_it_derives_from(tmp_path):
    model = Longer(tiny_model("bert").config, 5)
    liar.prune(model, tiny_batches(model), keep=0.6, criterion="magnitude", progress=False)
    liar.save(model, tmp_path)
    again = liar.load(tmp_path)
    assert type(again) is BertModel
    assert all(torch.equal(*pair) for pair in zip(again.parameters(), model.parameters(), strict=True))


def test_a_model_that_was_dequantised_is_ordinary(tmp_path):
    """As from a GGUF file: the mark is all that is left of it, and at it save_pretrained stops."""

    class Quantizer:
        quantization_config = type("Config", (), {"quant_method": "gguf"})()

        def is_serializable(self):
            return False

    model = tiny_model("llama", head="causal-lm")
    liar.prune(model, tiny_batches(model), keep=0.6, criterion="magnitude", progress=False)
    model.hf_quantizer, model.config.quantization_config = Quantizer(), {"quant_method": "gguf"}
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "theirs")
    liar.save(model, tmp_path / "ours")
    assert model.hf_quantizer is None
    assert "quantization_config" not in json.loads((tmp_path / "ours" / "config.json").read_text())
    liar.load(tmp_path / "ours")
    model.hf_quantizer = Quantizer()
    model.lm_head.weight = torch.nn.Parameter(torch.ones(96, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"lm_head\.weight is quantised"):
        liar.save(model, tmp_path / "ours")


def test_what_need_not_build_the_model_reads_every_folder(tmp_path, tokenizer):
    """Whatever layers have in common or not; and what builds the stock class stops, or is right."""
    for kind in KINDS:
        for seed in range(3):
            model = tiny_model(kind, head=KINDS[kind], num_hidden_layers=4)
            draw = random.Random(seed)
            units = {site.name: site.units for site in layout_of(model).sites}
            liar.remove(model, {name: draw.sample(range(n), draw.randint(1, n)) for name, n in units.items()})
            where = tmp_path / f"{kind}{seed}"
            liar.save(model, where, tokenizer=tokenizer)
            assert AutoTokenizer.from_pretrained(where)("w1 w2").input_ids == tokenizer("w1 w2").input_ids
            assert AutoConfig.from_pretrained(where).model_type == kind
            with pytest.raises(Exception, match=r"per-layer|size mismatch|ignore_mismatched_sizes"):
                AutoModel.from_pretrained(where)


# --- what save may replace ---


def test_other_files_and_folders_stay(tmp_path):
    model = tiny_model("bert")
    names = ["README.md", "thesis.tex", ".git", "checkpoint-5", "model.py", "training_args.bin", "1_Pooling", "notes.json"]
    names += ["model_best_epoch7.safetensors", "pytorch_model_mine.bin", "report.json", "mask.json", "model.safetensors.old"]
    for name in names:
        where = tmp_path / name
        model.save_pretrained(where / "m")
        (where / "m" / name).write_text("mine")
        with pytest.raises(CheckpointError, match=f"also holds {name}"):
            liar.save(model, where / "m")
        assert (where / "m" / name).read_text() == "mine"


@pytest.mark.parametrize("config", ['{"port": 8080}', "[]", "", "{", '"model_type"'])
def test_a_config_of_something_else_is_no_model(config, tmp_path):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match="expected a model folder"):
        liar.save(tiny_model("bert"), tmp_path)
    assert (tmp_path / "config.json").read_text() == config


def test_what_save_pretrained_has_written_is_replaced(tmp_path, tokenizer):
    """Shards, variants, and further chat templates in a folder of their own."""
    model = tiny_model("bert")
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    chatty.save_pretrained(tmp_path / "m")
    model.save_pretrained(tmp_path / "m", variant="fp16", max_shard_size="20KB")
    assert (tmp_path / "m" / "additional_chat_templates").is_dir()
    for _ in range(2):
        liar.save(model, tmp_path / "m", tokenizer=chatty)
    (tmp_path / "m" / "additional_chat_templates" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="also holds additional_chat_templates"):
        liar.save(model, tmp_path / "m")


def test_what_comes_into_the_folder_meanwhile_stays(tmp_path):
    """Between the first look and the swap lies all the work."""
    model = tiny_model("bert")
    liar.save(model, tmp_path / "m")

    class Slow:
        def save_pretrained(self, folder):
            (tmp_path / "m" / "thesis.tex").write_text("mine")

    with pytest.raises(CheckpointError, match=r"also holds thesis.tex"):
        liar.save(model, tmp_path / "m", tokenizer=Slow())
    assert (tmp_path / "m" / "thesis.tex").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only root may give files away")
def test_owners_stay(tmp_path):
    liar.save(tiny_model("bert"), tmp_path / "m")
    os.chown(tmp_path / "m", 65534, 65534)
    liar.save(tiny_model("bert", seed=1), tmp_path / "m")
    assert {(path.stat().st_uid, path.stat().st_gid) for path in (tmp_path / "m", *(tmp_path / "m").iterdir())} == {
        (65534, 65534)
    }


def test_what_save_has_written_it_replaces(tmp_path, tokenizer):
    """Extra files by any name too, since liar.json lists them."""
    model = tiny_model("bert")
    for _ in range(2):
        liar.save(model, tmp_path / "m", tokenizer=tokenizer, extra={"notes.txt": "a", "[odd]*.txt": "b"})
    (tmp_path / "m" / "o").write_text("mine")
    with pytest.raises(CheckpointError, match="also holds o"):
        liar.save(model, tmp_path / "m")


@pytest.mark.parametrize(
    "extra",
    [{"../up.txt": "x"}, {"/tmp/up.txt": "x"}, {"a/b": "x"}, {"": "x"}, {".": "x"}, {"..": "x"}, {"config.json": "x"},
     {"model.safetensors": "x"}, {"liar.json": "{}"}, {"a": 5}, {5: "a"}, [1], "text", {"a": "\ud800"}],
    ids=str,
)  # fmt: skip
def test_extra_files_are_plain_names_with_texts(extra, tmp_path):
    with pytest.raises(CheckpointError):
        liar.save(tiny_model("bert"), tmp_path / "m", extra=extra)
    assert not list(tmp_path.iterdir())


def test_hidden_folders_of_the_user_stay(tmp_path):
    names = [".m.liar-backup", ".m.liar-0a1b2c3d", ".liar-backup", ".liar-00000000-11111111"]
    for name in names:
        (tmp_path / name).mkdir()
    for seed in (0, 1):
        liar.save(tiny_model("bert", seed=seed), tmp_path / "m")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "m"])


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o2775])
def test_modes_stay(mode, tmp_path):
    target = tmp_path / "m"
    for seed in (0, 1):
        liar.save(tiny_model("bert", seed=seed), target)
        if not seed:
            target.chmod(mode)
    assert stat.S_IMODE(target.stat().st_mode) == mode
    mask = liar.select(tiny_model("bert"), keep=0.5, criterion="random")
    (tmp_path / "mask.json").touch(mode=0o640)
    mask.save(tmp_path / "mask.json")
    assert stat.S_IMODE((tmp_path / "mask.json").stat().st_mode) == 0o640


def test_new_files_have_the_modes_that_others_get(tmp_path):
    """safetensors makes files that only their owner may read."""
    (tmp_path / "plain").touch()
    usual = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    model = tiny_model("bert")
    liar.save(model, tmp_path / "m")
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "m").iterdir()} == {usual}
    liar.collect(model, tiny_batches(model), criteria=["wanda"], progress=False).save(tmp_path / "s")
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == usual


@pytest.mark.parametrize("inside", [".", "deeper"])
def test_the_current_folder_is_filled_and_never_replaced(inside, tmp_path, monkeypatch):
    here = tmp_path / "here"
    (here / inside).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(here)
    liar.save(tiny_model("bert"), inside)
    assert "config.json" in os.listdir(inside)
    liar.load(inside)
    monkeypatch.chdir(here / inside)
    with pytest.raises(CheckpointError, match="cannot be replaced in one step"):
        liar.save(tiny_model("bert", seed=1), ".")
    assert Path.cwd() == (here / inside).resolve()
    liar.load(".")


def test_a_folder_that_cannot_be_renamed_is_filled(tmp_path, monkeypatch):
    """A mounted volume: its parent may not be written to."""
    target = tmp_path / "volume"
    target.mkdir()
    original = Path.is_mount
    monkeypatch.setattr(Path, "is_mount", lambda path: path == target.resolve() or original(path))
    inode = target.stat().st_ino
    leftover = target / f"{liar.io.folders._prefix(target)}01234567"
    leftover.mkdir()
    (leftover / "half").write_text("")
    liar.save(tiny_model("bert"), target)
    assert target.stat().st_ino == inode
    assert not leftover.exists(), "what a killed run left is gone"
    liar.load(target)
    with pytest.raises(CheckpointError, match="cannot be replaced in one step"):
        liar.save(tiny_model("bert"), target)


def test_a_failure_while_filling_leaves_the_folder_empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rename = Path.rename

    def failing(path, target):
        if Path(target).name == "config.json":
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(CheckpointError, match="No space left"):
        liar.save(tiny_model("bert"), ".")
    assert not os.listdir(".")


@pytest.mark.parametrize("place", ["file/m", "loop", "loop/m"])
def test_places_that_are_none(place, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(CheckpointError):
        liar.save(tiny_model("bert"), tmp_path / place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for seed in (0, 1):
        liar.save(tiny_model("bert", seed=seed), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    liar.load(tmp_path / "real")


FULL = """
import resource, signal, sys
import liar
from liar.testing import tiny_batches, tiny_model
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model, other = tiny_model("bert"), tiny_model("bert", seed=1)
liar.save(model, "m")
mask = liar.select(model, keep=0.5, criterion="random")
mask.save("mask.json")
statistics = liar.collect(model, tiny_batches(model), criteria=["wanda"], progress=False)
statistics.save("statistics")
for size in (0, 100, 1000, 30_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    for call in (lambda: liar.save(other, "m"), lambda: mask.save("mask.json"), lambda: statistics.save("statistics")):
        try:
            call()
        except liar.LiarError as error:
            assert "cannot write" in str(error), error
        else:
            assert size > 100
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
import os, torch
assert sorted(os.listdir(".")) == ["m", "mask.json", "statistics"], os.listdir(".")
assert liar.Mask.load("mask.json") == mask and liar.CriterionStatistics.load("statistics").norms
state = liar.load("m").state_dict()
assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
"""


@pytest.mark.skipif(os.name != "posix", reason="limits of file sizes are POSIX")
def test_files_that_cannot_grow(tmp_path):
    """A real error of the system in the middle of a file; tests/kill has real full disks."""
    subprocess.run([sys.executable, "-c", FULL], cwd=tmp_path, check=True, timeout=120)


def test_single_files_are_whole_or_as_they_were(tmp_path, monkeypatch):
    model = tiny_model("bert")
    old, new = (liar.select(model, keep=keep, criterion="random") for keep in (0.5, 0.9))
    old.save(tmp_path / "mask.json")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(CheckpointError, match="Input/output error; what was there is as it was"):
        new.save(tmp_path / "mask.json")
    monkeypatch.undo()
    assert liar.Mask.load(tmp_path / "mask.json") == old
    assert [path.name for path in tmp_path.iterdir()] == ["mask.json"]
    (tmp_path / "link.json").symlink_to(tmp_path / "mask.json")
    new.save(tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert liar.Mask.load(tmp_path / "mask.json") == new
    with pytest.raises(LiarError):
        new.save(tmp_path)
    with pytest.raises(LiarError):
        new.save(tmp_path / "nowhere" / "mask.json")


def test_masked_lm_checkpoints_of_others(tmp_path):
    """Negative control: what transformers itself leaves out or ties is not missing."""
    model = BertForMaskedLM(tiny_model("bert").config)
    model.save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.update({"bert.embeddings.position_ids": torch.arange(64)[None]}))
    assert type(liar.load(tmp_path)) is BertForMaskedLM
