"""Folders of pruned models with damage of every kind, and places that nothing can be saved to."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import tempfile
from pathlib import Path

import safetensors.torch
import torch
from commands import command
from folders import BERT
from hypothesis import example
from hypothesis import strategies as st
from strategies import JSON, ODD, TEXTS, inputs, json_files, with_value
from unchanged import Refused, assert_runs, attempt

import liar
from liar.testing import tiny_model

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def _pruned(*arguments, uniform=False, **options):
    model = tiny_model(*arguments, **options)
    neurons = [range(0, 64, 2), range(0, 64, 2)] if uniform else [range(0, 64, 3), range(5, 40)]
    liar.remove(model, {"heads": [[0, 1], [0, 1]] if uniform else [[0], [0, 1]], "neurons": [list(row) for row in neurons]})
    return model


MODELS = {
    "bert": _pruned("bert"),
    "llama": _pruned("llama", head="causal-lm"),
    "uniform": _pruned("bert", head="sequence-classification", num_labels=3, uniform=True),
    "tied": _pruned("llama", head="causal-lm", tie_word_embeddings=True),
    "sharded": _pruned("gpt2", head="causal-lm"),
}


def _files(name):
    """The files of a model's folder by name."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "slim"
        liar.save(MODELS[name], target)
        if name == "sharded":
            (target / WEIGHTS).unlink()
            MODELS[name].save_pretrained(target / "shards", max_shard_size="20KB")
            for path in (target / "shards").glob("model*"):
                path.rename(target / path.name)
            shutil.rmtree(target / "shards")
        return {path.name: path.read_bytes() for path in sorted(target.iterdir())}


FILES = {name: _files(name) for name in MODELS}
STATES = {name: model.state_dict() for name, model in MODELS.items()}
SITES = {name: {site.name: site.units for site in liar.discover(model).sites} for name, model in MODELS.items()}
NAMES = st.sampled_from(list(MODELS))
TENSORS = ["drop", "rename", "reshape", "transpose", "add", "swap", "integer", "scalar", "empty", "half"]


@st.composite
def damages(draw):
    """(model, kind of damage, what belongs to it)."""
    name = draw(NAMES)
    files, kind = (
        FILES[name],
        draw(st.sampled_from(["json", "json", "json", "tensor", "tensor", "flip", "cut", "missing", "other"])),
    )
    whole = {
        "json": st.sampled_from([file for file in files if file.endswith(".json") and file != "generation_config.json"]),
        "tensor": st.sampled_from([file for file in files if file.endswith(".safetensors")]),
    }
    file = draw(whole.get(kind, st.sampled_from(list(files))))
    more = {
        "json": json_files(files[file].decode()) if kind == "json" else st.none(),
        "tensor": st.tuples(st.sampled_from(TENSORS), st.integers(0, 50)),
        # Half of the damage near the start, where the headers are.
        "flip": st.lists(st.tuples(st.integers(0, 200) | st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=3),
        "cut": st.integers(0, 200) | st.integers(0, 10**6),
        "missing": st.none(),
        "other": st.sampled_from(["bin", "folder", "empty", "link", "pickle"]),
    }
    return name, kind, file, draw(more[kind])


def _damage(name, kind, file, how, folder):
    """Write the files of a model with a damage; True where the weights themselves may be others, unnoticeably."""
    folder.mkdir()
    for each, content in FILES[name].items():
        (folder / each).write_bytes(content)
    path = folder / file
    content = path.read_bytes()
    if kind == "json":
        path.write_bytes(how)
    elif kind == "tensor":
        path.write_bytes(safetensors.torch.save(_tensors(safetensors.torch.load(content), *how), {"format": "pt"}))
        return how[0] in ("swap", "integer", "half", "transpose")
    elif kind == "flip":
        changed = bytearray(content)
        for place, bits in how:
            changed[place % len(content)] ^= bits
        path.write_bytes(changed)
        return file.endswith(".safetensors")
    elif kind == "cut":
        path.write_bytes(content[: how % len(content)])
    elif kind == "missing" or how == "link":
        path.unlink()
        if how == "link":
            path.symlink_to(path)
    elif how == "bin":
        for each in folder.glob("*safetensors*"):
            each.unlink()
        torch.save(STATES[name], folder / "pytorch_model.bin")
    elif how == "pickle":
        for each in folder.glob("*safetensors*"):
            each.unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Executed()))
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "folder":
        path.unlink()
        path.mkdir()
    return False


class _Executed:
    """Leaves a folder `executed` if it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def _tensors(tensors, way, number):
    names = sorted(tensors)
    name, other = names[number % len(names)], names[(number + 1) % len(names)]
    value = tensors[name]
    if way == "drop":
        del tensors[name]
    elif way == "rename":
        tensors[f"{name}_"] = tensors.pop(name)
    elif way == "add":
        tensors[f"{name}_"] = value.clone()
    elif way == "swap":
        tensors[name], tensors[other] = tensors[other].clone(), value.clone()
    else:
        tensors[name] = {
            "reshape": lambda: value[:-1].clone(),
            "transpose": lambda: value.T.contiguous(),
            "integer": value.long,
            "scalar": lambda: value.flatten()[0].clone(),
            "empty": lambda: value[:0].clone(),
            "half": value.half,
        }[way]()
    return tensors


def _assert_loaded(model, name, *, same_weights):
    """A model that was loaded is the one that was saved: type, units, layers, weights, and it runs."""
    assert {site.name: site.units for site in liar.discover(model).sites} == SITES[name]
    state = model.state_dict()
    assert state.keys() == STATES[name].keys()
    for key, value in state.items():
        assert value.shape == STATES[name][key].shape, key
        if same_weights:
            torch.testing.assert_close(value.to(STATES[name][key].dtype), STATES[name][key], rtol=1e-2, atol=1e-2, msg=key)
            assert value.dtype != STATES[name][key].dtype or torch.equal(value, STATES[name][key]), key
    assert not model.training
    if same_weights:
        assert_runs(model)


def _entry(name, *path, new, file="config.json"):
    return name, "json", file, with_value(FILES[name][file], *path, new=new)


# what is no configuration
@example(damage=("bert", "json", "config.json", b"null"))
@example(damage=("bert", "json", "config.json", b"[null]"))
@example(damage=("bert", "json", "config.json", b'"b"'))
@example(damage=("bert", "json", "config.json", b"[" * 100_000))
# entries of the wrong type, or out of all bounds
@example(damage=_entry("llama", "model_type", new="nobody"))
@example(damage=_entry("bert", "layer_norm_eps", new={}))
@example(damage=_entry("bert", "num_hidden_layers", new=2**64))
@example(damage=_entry("bert", "dtype", new=3))
@example(damage=_entry("bert", "pad_token_id", new=-(2**31)))
@example(damage=_entry("bert", "vocab_size", new=10))
@example(damage=_entry("bert", "vocab_size", new=2**64))
@example(damage=_entry("bert", "num_attention_heads", new=7))
@example(damage=_entry("llama", "head_dim", new=55))
@example(damage=_entry("llama", "rope_parameters", "rope_type", new="defau_t"))
@example(damage=_entry("bert", "architectures", new=[0.0]))
@example(damage=_entry("bert", "architectures", new=[]))
# another model: more layers, fewer, another class
@example(damage=_entry("bert", "num_hidden_layers", new=3))
@example(damage=_entry("bert", "num_hidden_layers", new=1))
@example(damage=_entry("uniform", "architectures", new=["BertModel"]))
@example(damage=_entry("bert", "architectures", new=["BertForSequenceClassification"]))
@example(damage=_entry("llama", "architectures", new=None))
# what is no index
@example(damage=("sharded", "json", INDEX, b"null"))
@example(damage=_entry("sharded", "weight_map", new=None, file=INDEX))
@example(damage=_entry("sharded", "metadata", new=54, file=INDEX))
@example(damage=("sharded", "json", INDEX, b"[" * 100_000))
# tensors that are not there (and would be random), or not what they were
@example(damage=("bert", "tensor", WEIGHTS, ("drop", 0)))
@example(damage=("llama", "tensor", WEIGHTS, ("rename", 6)))
@example(damage=("uniform", "tensor", WEIGHTS, ("add", 0)))
@example(damage=("bert", "tensor", WEIGHTS, ("swap", 42)))
@example(damage=("tied", "tensor", WEIGHTS, ("drop", 0)))
@example(damage=("bert", "tensor", WEIGHTS, ("integer", 0)))
@example(damage=("bert", "other", WEIGHTS, "bin"))
@example(damage=("bert", "other", WEIGHTS, "pickle"))
@inputs(130, damage=damages())
def test_load(place, damage):
    folder = place / "slim"
    try:
        unnoticeable = _damage(*damage, folder)
        model = attempt(lambda: liar.load(folder), folder=place)
        if not isinstance(model, Refused):
            _assert_loaded(model, damage[0], same_weights=not unnoticeable)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


ARGUMENTS = ["dtype", "device_map", "variant", "revision", "subfolder", "config", "attn_implementation"]
ARGUMENTS += ["num_hidden_layers", "trust_remote_code"]


@example(name="bert", option="device_map", value=())
@example(name="bert", option="device_map", value={})
@example(name="bert", option="attn_implementation", value=())
@example(name="bert", option="subfolder", value=None)
@example(name="bert", option="num_hidden_layers", value={})
@example(name="llama", option="config", value=1)
@example(name="llama", option="variant", value="x" * 5000)
@inputs(30, name=NAMES, option=st.sampled_from(ARGUMENTS), value=ODD)
def test_arguments_of_load(place, name, option, value):
    folder = place / "slim"
    try:
        _damage(name, "whole", WEIGHTS if name != "sharded" else INDEX, None, folder)
        model = attempt(lambda: liar.load(folder, **{option: value}), folder=place)
        if isinstance(model, torch.nn.Module) and option != "dtype":
            _assert_loaded(model, name, same_weights=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


PLACES = st.one_of(
    st.sampled_from(["", ".", "..", "new", "new/deep/er", "file", "file/below", "loop", "full", "model", "linked", "dangling"]),
    st.sampled_from(["~", "~/x", "x" * 300, "x\0y", "a b", "[ab]", "\udcff", Path("new"), b"new"]),
    TEXTS.filter(lambda text: "." not in text),
    ODD,
)


@example(name="bert", where="new", option="mask", value={})
@example(name="bert", where="new", option="report", value=[])
@example(name="bert", where="new", option="tokenizer", value={})
@example(name="bert", where="new", option="extra", value=[1])
@example(name="bert", where="new", option="extra", value=[{}])
@example(name="bert", where="new", option="extra", value={None: "a"})
@example(name="bert", where="new", option="extra", value={"a": 5})
@example(name="bert", where="new", option="extra", value={"a": "\ud800"})
@example(name="bert", where="new", option="extra", value={"../../x": "a"})
@example(name="bert", where="new", option="extra", value={"config.json": "{}"})
@example(name="bert", where=None, option="none", value=None)
@example(name="bert", where="x" * 300, option="none", value=None)
@example(name="bert", where="x\0y", option="none", value=None)
@example(name="bert", where="\ud800", option="none", value=None)
@example(name="bert", where="\udcff", option="none", value=None)
@example(name="bert", where="loop", option="none", value=None)
@inputs(
    50,
    name=NAMES,
    where=PLACES,
    option=st.sampled_from(["mask", "report", "extra", "tokenizer", "overwrite", "none"]),
    value=ODD
    | st.dictionaries(
        st.sampled_from(["run.json", "../x", "config.json", WEIGHTS, "a/b", "", "."]) | TEXTS, TEXTS | JSON, max_size=2
    ),
)
def test_save(place, name, where, option, value):
    here = Path.cwd()
    model = copy.deepcopy(MODELS[name])
    try:
        (here / "file").write_text("mine")
        (here / "full").mkdir()
        (here / "full" / "mine.txt").write_text("mine")
        liar.save(MODELS["bert"], here / "model")
        (here / "loop").symlink_to("loop")
        (here / "linked").symlink_to("model")
        (here / "dangling").symlink_to("nothing")
        more = {} if option == "none" else {option: value}
        if not isinstance(attempt(lambda: liar.save(model, where, **more), model, folder=place, changes=True), Refused):
            _assert_loaded(liar.load(where), name, same_weights=True)
            assert (here / "file").read_text() == "mine"
            assert (here / "full" / "mine.txt").read_text() == "mine"
            assert sorted(path.name for path in place.iterdir()) == ["one"]
    finally:
        os.chdir(place)
        for path in place.iterdir():
            shutil.rmtree(path)
        here.mkdir(parents=True)
        os.chdir(here)


DAMAGED = st.sampled_from([name for name in BERT if name.endswith(".json")]).flatmap(
    lambda name: st.tuples(st.just(name), json_files(BERT[name].decode()))
)


@example(damaged=("tokenizer.json", b"3"))
@example(damaged=("tokenizer.json", b'{"model": 1}'))
@example(damaged=("tokenizer_config.json", b"[" * 100_000))
@example(damaged=("config.json", with_value(BERT["config.json"], "hidden_act", new=[])))
@inputs(30, damaged=DAMAGED)
def test_command_line(home, damaged):
    path, out = home / "bert" / damaged[0], home / "mask.json"
    path.write_bytes(damaged[1])
    try:
        arguments = ["select", home / "bert", out, "--keep", 0.5, "--criterion", "wanda", "--calib", home / "texts.txt"]
        if not isinstance(command(*arguments, folder=home), Refused):
            liar.Mask.load(out)
    finally:
        path.write_bytes(BERT[damaged[0]])
        out.unlink(missing_ok=True)


def test_an_undamaged_folder_loads(place):
    for name in MODELS:
        _damage(name, "whole", next(iter(FILES[name])), None, place / "slim")
        _assert_loaded(liar.load(place / "slim"), name, same_weights=True)
        shutil.rmtree(place / "slim")
