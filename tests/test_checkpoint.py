"""Saving and loading: round trips to the bit, folders that stock transformers loads, kills at any moment, messages."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import transformers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

import liar
from liar.errors import CheckpointError
from liar.io import folders
from liar.models import layout_of
from liar.surgery import cut_site
from liar.versions import versions

BERT = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 64, "vocab_size": 100}
LLAMA = {**BERT, "num_key_value_heads": 2, "max_position_embeddings": 64}
GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 3, "vocab_size": 100, "n_positions": 64}
CLASSES = [
    (BertModel, {}),
    (BertForMaskedLM, {}),
    (BertForSequenceClassification, {"num_labels": 3}),
    (BertForQuestionAnswering, {}),
    (LlamaForCausalLM, {}),
    (LlamaForCausalLM, {"tie_word_embeddings": True}),
    (LlamaForCausalLM, {"num_key_value_heads": 4}),
    (LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    (LlamaForSequenceClassification, {"num_labels": 3, "pad_token_id": 0}),
    (GPT2LMHeadModel, {}),
    (GPT2Model, {"n_inner": 48}),
]
IDS = [f"{cls.__name__}-{'-'.join(more)}" for cls, more in CLASSES]


def make(cls, seed=0, **more):
    torch.manual_seed(seed)
    config_class, sizes = {"Bert": (BertConfig, BERT), "Llam": (LlamaConfig, LLAMA), "GPT2": (GPT2Config, GPT2)}[
        cls.__name__[:4]
    ]
    return cls(config_class(**{**sizes, **more})).eval()


def cut(model, units=None, seed=0):
    """Cut every site, to a random number of units or to those named; the model and the mask."""
    draw = random.Random(seed)
    masks = {}
    for site in layout_of(model).sites:
        count = units[site.kind] if units else draw.randint(1, site.units)
        kept = torch.zeros(site.units, dtype=torch.bool)
        kept[draw.sample(range(site.units), count)] = True
        cut_site(model.get_submodule(site.block), site, kept)
        masks[site.name] = kept
    return model, liar.Mask(masks)


def ids(rows=2, length=9):
    return torch.randint(1, 100, (rows, length), generator=torch.Generator().manual_seed(1))


def assert_same(one, other):
    """Same class, same tensors, same outputs, to the bit."""
    assert type(one) is type(other)
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=0, atol=0)
    with torch.no_grad():
        assert torch.equal(one(ids())[0], other(ids())[0])


@pytest.mark.parametrize(("cls", "more"), CLASSES, ids=IDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_round_trip_of_uneven_widths(cls, more, seed, tmp_path):
    model, mask = cut(make(cls, **more), seed=seed)
    liar.save(model, tmp_path / "slim", mask=mask)
    again = liar.load(tmp_path / "slim")
    assert type(again) is cls
    assert not again.training
    assert_same(model, again)
    # Once more, from what was loaded: nothing is lost the second time either.
    liar.save(again, tmp_path / "slim")
    assert_same(model, liar.load(tmp_path / "slim"))


@pytest.mark.parametrize(("cls", "more"), CLASSES, ids=IDS)
def test_dense_model_round_trip(cls, more, tmp_path):
    model = make(cls, **more)
    liar.save(model, tmp_path / "dense")
    assert "per_layer_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert_same(model, liar.load(tmp_path / "dense"))


def test_folder_written_by_save_pretrained_alone(tmp_path):
    """As a Trainer does it: no liar.json, and a config.json that still tells the dense sizes."""
    model, _ = cut(make(BertForMaskedLM))
    model.save_pretrained(tmp_path)
    assert_same(model, liar.load(tmp_path))


def test_sharded_folder(tmp_path):
    model, _ = cut(make(LlamaForCausalLM))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert_same(model, liar.load(tmp_path))
    next(iter(tmp_path.glob("model-*.safetensors"))).unlink()
    with pytest.raises(CheckpointError, match="expected whole weight files"):
        liar.load(tmp_path)


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}])
def test_name_on_the_hub(shards, tmp_path):
    """Out of a cache as the hub's client lays it out, so that no network is needed."""
    model, _ = cut(make(LlamaForCausalLM))
    commit = "0123456789" * 4
    repository = tmp_path / "models--me--slim"
    model.save_pretrained(repository / "snapshots" / commit, **shards)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert_same(model, liar.load("me/slim", cache_dir=tmp_path, local_files_only=True))
    with pytest.raises(CheckpointError, match=r"me/other: expected a model folder .*, or a name on the hub"):
        liar.load("me/other", cache_dir=tmp_path, local_files_only=True)


def test_device_map(tmp_path):
    model, _ = cut(make(LlamaForCausalLM))
    liar.save(model, tmp_path)
    assert_same(model, liar.load(tmp_path, device_map="cpu"))


def test_no_architectures_gives_the_bare_model(tmp_path, caplog):
    model, _ = cut(make(BertForMaskedLM))
    liar.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"liar\.json says BertForMaskedLM, config\.json None"):
        liar.load(tmp_path)
    (tmp_path / "liar.json").unlink()
    bare = liar.load(tmp_path)
    assert "not used: cls.predictions" in caplog.text
    assert type(bare) is BertModel
    with torch.no_grad():
        assert torch.equal(bare(ids())[0], model.bert(ids())[0])


def test_arguments_reach_transformers(tmp_path):
    model, _ = cut(make(LlamaForCausalLM))
    liar.save(model, tmp_path)
    again, info = liar.load(
        tmp_path, dtype=torch.bfloat16, attn_implementation="eager", use_cache=False, output_loading_info=True
    )
    assert again.dtype == torch.bfloat16
    assert again.config._attn_implementation == "eager"
    assert again.config.use_cache is False
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert type(again) is LlamaForCausalLM


def test_bfloat16(tmp_path):
    liar.save(make(LlamaForCausalLM), tmp_path / "dense")
    model, _ = cut(liar.load(tmp_path / "dense", dtype=torch.bfloat16))
    liar.save(model, tmp_path / "slim")
    again = liar.load(tmp_path / "slim")
    assert again.dtype == torch.bfloat16
    assert_same(model, again)


def test_tied_embeddings_stay_tied(tmp_path):
    model, _ = cut(make(LlamaForCausalLM, tie_word_embeddings=True))
    liar.save(model, tmp_path)
    again = liar.load(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_loaded_model_can_be_cut_again(tmp_path):
    first, _ = cut(make(LlamaForCausalLM), {"heads": 2, "neurons": 40})
    liar.save(first, tmp_path)
    second, _ = cut(liar.load(tmp_path), seed=3)
    liar.save(second, tmp_path)
    assert_same(second, liar.load(tmp_path))


def test_created_bias(tmp_path):
    model = make(LlamaForCausalLM)
    mask = {"heads": [[0], [0, 1], [1]], "neurons": [list(range(40)), list(range(30)), list(range(64))]}
    report = liar.reconstruct(model, mask, [ids(16, 20)], bias="create", progress=False)
    created = {site.module for site in report.sites if site.bias_created}
    assert created
    liar.save(model, tmp_path, report=report)
    again = liar.load(tmp_path)
    assert_same(model, again)
    assert {name for name, layer in again.named_modules() if getattr(layer, "bias", None) is not None} == created
    with pytest.raises(Exception, match=r"per-layer attribute|size mismatch|mismatched"):
        LlamaForCausalLM.from_pretrained(tmp_path)
    assert liar.Report.load(tmp_path / "report.json").verdicts == report.verdicts


def test_config_json_tells_uneven_widths_layer_by_layer(tmp_path):
    model, mask = cut(make(LlamaForCausalLM))
    liar.save(model, tmp_path, mask=mask)
    layers = json.loads((tmp_path / "config.json").read_text())["per_layer_config"]
    assert layers == {
        str(layer): {
            "num_attention_heads": 2 * mask.kept(f"heads.{layer}"),
            "num_key_value_heads": mask.kept(f"heads.{layer}"),
            "intermediate_size": mask.kept(f"neurons.{layer}"),
        }
        for layer in range(3)
    }
    with pytest.raises(Exception, match=r"per-layer attribute|size mismatch|mismatched"):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_liar_json(tmp_path):
    model, mask = cut(make(BertModel))
    liar.save(model, tmp_path / "with", mask=mask)
    liar.save(model, tmp_path / "without")
    record = json.loads((tmp_path / "with" / "liar.json").read_text())
    assert record["format"] == 1
    assert record["versions"]["torch"] == torch.__version__
    kept = mask["neurons.1"].nonzero().flatten().tolist()
    assert record["sites"]["neurons.1"] == {"units": len(kept), "kept": kept, "of": 64}
    record = json.loads((tmp_path / "without" / "liar.json").read_text())
    assert record["sites"]["neurons.1"] == {"units": len(kept)}


STOCK = """
import sys
class Blocked:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] == "liar":
            raise ImportError("liar is blocked")
sys.meta_path.insert(0, Blocked())
import torch, transformers
torch.set_num_threads(1)  # as in this process: sums are split by threads, and these outputs must agree bit for bit
for name in sys.argv[2:]:
    model = getattr(transformers, name).from_pretrained(f"{sys.argv[1]}/{name}")
    inputs, outputs = torch.load(f"{sys.argv[1]}/{name}.pt")
    with torch.no_grad():
        torch.testing.assert_close(model(inputs)[0], outputs, rtol=0, atol=0)
try:
    import liar
except ImportError:
    print("without liar")
"""


def test_even_widths_load_without_liar(tmp_path):
    cases = [
        (BertForSequenceClassification, {"heads": 4, "neurons": 24}),
        (LlamaForCausalLM, {"heads": 1, "neurons": 24}),
        (LlamaForSequenceClassification, {"heads": 2, "neurons": 1}),
        # GPT-2's `n_inner` is not in its configuration until it is pruned.
        (GPT2LMHeadModel, {"heads": 4, "neurons": 24}),
    ]
    for cls, units in cases:
        model, _ = cut(make(cls, pad_token_id=0), units)
        liar.save(model, tmp_path / cls.__name__)
        assert_same(model, liar.load(tmp_path / cls.__name__))
        with torch.no_grad():
            torch.save((ids(), model(ids())[0]), tmp_path / f"{cls.__name__}.pt")
    command = [sys.executable, "-c", STOCK, str(tmp_path), *(cls.__name__ for cls, _ in cases)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "without liar"


def test_unknown_family_loads_through_its_stock_class(tmp_path, registry):
    registry.pop("gpt2")
    model = make(GPT2LMHeadModel)
    assert model.config.model_type not in {family.model_type for family in liar.families()}
    model.save_pretrained(tmp_path)
    assert_same(model, liar.load(tmp_path))


def test_quantised_and_explicit_configurations_go_the_stock_way(tmp_path):
    model = make(BertModel)
    liar.save(model, tmp_path)
    assert_same(model, liar.load(tmp_path, config=model.config))


# Writing in one step.


def child(work, *arguments):
    """Start a process that does `work` and nothing after it; a hang ends it with another signal than ours."""
    number = os.fork()
    if number == 0:
        signal.alarm(60)
        with suppress(BaseException):
            work(*arguments)
        os._exit(1)
    return number


def save_for_ever(models, target):
    for model in itertools.cycle(models):
        liar.save(model, target, extra={"which.txt": str(model.config.intermediate_size)})


def test_a_kill_at_any_moment_leaves_a_whole_folder(tmp_path):
    target = tmp_path / "model"
    models = {width: make(BertModel, seed=width, intermediate_size=width, vocab_size=5000) for width in (24, 40)}
    draw = random.Random(0)
    liar.save(models[24], tmp_path / "warm" / "up")
    began = time.perf_counter()
    liar.save(models[24], tmp_path / "warm" / "up")
    pace = time.perf_counter() - began
    shutil.rmtree(tmp_path / "warm")
    widths, inside = [], 0
    for _ in range(30):
        number = child(save_for_ever, list(models.values()), target)
        time.sleep(draw.random() * 5 * pace)
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)
        inside += any(path != target for path in tmp_path.iterdir())
        if target.exists():
            widths.append(int((target / "which.txt").read_text()))
            assert_same(models[widths[-1]], liar.load(target))
    assert len(set(widths)) == 2, "the kills are to fall between several saves"
    assert inside, "and some of them inside one"
    liar.save(make(BertModel), target)
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "what the killed runs left is gone"


@pytest.mark.parametrize("moment", ["model", "tokenizer", "sync", "swap", "swapped", "clean"])
def test_a_death_at_each_stage(moment, tmp_path):
    """The process ends without a word at a chosen stage; the folder is the old one before the swap and the new one after."""
    target = tmp_path / "model"
    old = make(BertModel, seed=1)
    liar.save(old, target)
    new = make(BertModel, seed=2)
    number = child(die_while_saving, moment, new, target)
    assert os.waitpid(number, 0)[1] == signal.SIGKILL, "killed where it should be"
    assert_same(new if moment in ("swapped", "clean") else old, liar.load(target))
    liar.save(new, target)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def die_while_saving(moment, model, target):
    _die_at(moment)
    liar.save(model, target, tokenizer=_Tokenizer(moment))


def _die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


class _Tokenizer:
    def __init__(self, moment):
        self.moment = moment

    def save_pretrained(self, folder):
        if self.moment == "tokenizer":
            _die()


def _die_at(moment):
    swap = folders._swap

    def swapped(*arguments):
        swap(*arguments)
        _die()

    if moment == "model":
        BertModel.save_pretrained = lambda self, folder, **_: (Path(folder, "config.json").write_text("{"), _die())
    elif moment == "swapped":
        folders._swap = swapped
    elif moment in ("sync", "swap", "clean"):
        setattr(folders, f"_{moment}", _die)


def test_without_an_exchange_in_one_step(tmp_path, monkeypatch):
    """The way of systems without renameat2."""
    monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    for seed in (1, 2):
        model = make(BertModel, seed=seed)
        liar.save(model, tmp_path / "model")
        assert_same(model, liar.load(tmp_path / "model"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_error_leaves_the_old_folder(tmp_path):
    old = make(BertModel, seed=1)
    liar.save(old, tmp_path / "model")
    with pytest.raises(CheckpointError, match="expected a plain file name with a text, got a int"):
        liar.save(make(BertModel, seed=2), tmp_path / "model", extra={"run.json": 3})
    assert_same(old, liar.load(tmp_path / "model"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_another_process_fills_is_left_alone(tmp_path):
    with folders.replacing(tmp_path / "model") as slow:
        (slow / "begun").write_text("")
        liar.save(make(BertModel), tmp_path / "model")
        assert (slow / "begun").exists()


def test_what_was_in_the_folder_is_gone(tmp_path):
    model = make(BertModel)
    model.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    liar.save(model, tmp_path / "m", extra={"mask.json": "{}"})
    names = {"README.md", "config.json", "model.safetensors", "liar.json", "mask.json"}
    assert {path.name for path in (tmp_path / "m").iterdir()} == names


def test_symbolic_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    liar.save(make(BertModel), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").exists()


# Messages.


def test_refuses_to_replace_what_is_no_model_folder(tmp_path):
    (tmp_path / "thesis.txt").write_text("three years")
    with pytest.raises(CheckpointError, match=r"expected a model folder \(with the config.json of a model\) or an empty one"):
        liar.save(make(BertModel), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "three years"


def test_refuses_to_replace_a_folder_with_models_inside(tmp_path):
    model = make(BertModel)
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "checkpoint-500")
    with pytest.raises(CheckpointError, match="also holds checkpoint-500"):
        liar.save(model, tmp_path)


def test_refuses_a_file_and_a_full_folder(tmp_path):
    model = make(BertModel)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="expected a folder, or nothing yet, got a file"):
        liar.save(model, tmp_path / "file")
    liar.save(model, tmp_path / "model", overwrite=False)
    with pytest.raises(CheckpointError, match="is there already and not empty; choose another folder"):
        liar.save(model, tmp_path / "model", overwrite=False)


def test_refuses_a_mask_of_another_model(tmp_path):
    model, _ = cut(make(BertModel), seed=0)
    _, other = cut(make(BertModel), seed=1)
    with pytest.raises(CheckpointError, match=r"the mask is not the one this model was cut by: the units of .*neurons.0"):
        liar.save(model, tmp_path / "m", mask=other)
    assert not (tmp_path / "m").exists()


def test_load_says_what_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match="expected a model folder, got nothing there; check the path"):
        liar.load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="expected a model folder, got a file"):
        liar.load(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"expected a model folder with a readable config.json"):
        liar.load(tmp_path)


@pytest.mark.parametrize("length", [0, 5, 100, 3000, -1])
def test_load_of_a_truncated_file(length, tmp_path):
    liar.save(make(BertModel), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"expected whole weight files, got .* damaged or incomplete: copy or save it"):
        liar.load(tmp_path)


def test_load_without_weights(tmp_path):
    liar.save(make(BertModel), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"cannot load .*no file named model.safetensors"):
        liar.load(tmp_path)


def test_load_of_a_broken_configuration(tmp_path):
    liar.save(make(BertModel), tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"')
    with pytest.raises(CheckpointError, match=r"expected a model folder with a readable config.json"):
        liar.load(tmp_path)


def test_load_of_shapes_that_do_not_belong_together(tmp_path):
    model, _ = cut(make(LlamaForCausalLM), {"heads": 1, "neurons": 24})
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 25, bias=False)
    model.save_pretrained(tmp_path)
    message = r"neurons.1: expected tensors with one number of units, from 1 to 64, got .*up_proj.weight \[25, 32\]"
    with pytest.raises(CheckpointError, match=message):
        liar.load(tmp_path)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_load_of_a_site_without_units(tmp_path):
    model = make(LlamaForCausalLM)
    mlp = model.model.layers[1].mlp
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = (torch.nn.Linear(*size, bias=False) for size in ((32, 0), (32, 0), (0, 32)))
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"neurons.1: expected .* from 1 to 64, got .*up_proj.weight \[0, 32\]"):
        liar.load(tmp_path)


def test_load_of_more_units_than_configured(tmp_path):
    liar.save(make(BertModel), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 8}))
    with pytest.raises(CheckpointError, match=r"from 1 to 8, got .* do not belong together"):
        liar.load(tmp_path)


def test_versions_name_this_library():
    assert transformers.__version__ == versions()["transformers"]
