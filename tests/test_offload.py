"""Models that accelerate has dispatched: the same answers as for ordinary ones, hooks that still work, and clear errors."""

import copy
import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from transformers import AutoModel, LlamaForCausalLM

import liar
from benchmarks.offload import can_limit, measure
from liar.errors import CheckpointError, ModelError, OptionError
from liar.models import compute_device, count_parameters, layout_of, plain_block
from liar.runtime import capture_activations, exclusive, Point, outputs_of, record_gradients, recompute_blocks
from liar.testing import tiny_batches, tiny_model

accelerate = pytest.importorskip("accelerate")
hooks = pytest.importorskip("accelerate.hooks")


def cpu_offload(model, folder):
    return accelerate.cpu_offload(copy.deepcopy(model))


def buffers_too(model, folder):
    return accelerate.cpu_offload(copy.deepcopy(model), offload_buffers=True)


def disk_offload(model, folder):
    return accelerate.disk_offload(copy.deepcopy(model), folder / "offloaded")


def written(model, folder, device_map):
    model.save_pretrained(folder / "model", max_shard_size="40KB")
    return type(model).from_pretrained(folder / "model", device_map=device_map, offload_folder=folder / "offloaded")


def on_disk(model, folder):
    return written(model, folder, {"": "disk"})


def mixed(model, folder):
    """Every second block on the disk, and what is before the blocks."""
    places = {name: "cpu" for name, module in model.named_modules() if not list(module.children())}
    blocks = layout_of(model).blocks
    places = {name: place for name, place in places.items() if not name.startswith(blocks)}
    places |= {block: ("disk", "cpu")[number % 2] for number, block in enumerate(blocks)}
    return written(model, folder, places | {next(iter(places)): "disk"})


KINDS = {each.__name__: each for each in (cpu_offload, buffers_too, disk_offload, on_disk, mixed)}
MODELS = {
    "bert": partial(tiny_model, "bert", head="sequence-classification"),
    "llama": partial(tiny_model, "llama", head="causal-lm"),
    "tied llama": partial(tiny_model, "llama", head="causal-lm", tie_word_embeddings=True),
    "t5": partial(tiny_model, "t5"),
    "gpt2": partial(tiny_model, "gpt2"),
}
PAIRS = [(name, kind) for name in ("bert", "llama") for kind in KINDS] + [
    ("tied llama", "cpu_offload"),
    ("tied llama", "on_disk"),
    ("t5", "disk_offload"),
    ("gpt2", "on_disk"),
]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(params=PAIRS, ids=" ".join)
def pair(request, tmp_path):
    """A model as it is, and one that accelerate has dispatched."""
    name, kind = request.param
    plain = MODELS[name]()
    return plain, KINDS[kind](plain, tmp_path)


def weights_of(model):
    """Every value of a model, wherever it is kept."""
    with liar.models.stored_state(model):
        return {name: value.clone() for name, value in model.state_dict().items()}


def state_of(model):
    modules = dict(model.named_modules())
    return {
        "hooks": {name: id(vars(module).get("_hf_hook")) for name, module in modules.items()},
        "forwards": {name: id(vars(module).get("forward")) for name, module in modules.items()},
        "parameters": {name: (value.device, value.shape, value.requires_grad) for name, value in model.named_parameters()},
        "modes": {name: module.training for name, module in modules.items()},
        "sizes": {
            name: {k: v for k, v in vars(module).items() if isinstance(v, (int, str))} for name, module in modules.items()
        },
        "torch's hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in modules.items()},
        "configuration": model.config.to_dict(),
        "random state": torch.get_rng_state().tolist(),
    }


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def numbers(report):
    """A report without its times."""
    content = json.loads(report.to_json())
    content.pop("seconds")
    return [{**site, "seconds": 0} for site in content.pop("sites")], content


def test_the_pruned_model_is_that_of_an_ordinary_one(pair, tmp_path):
    """Bit for bit: report, weights, outputs through accelerate's hooks, what is saved, and what is loaded again."""
    plain, dispatched = pair
    batches = tiny_batches(plain)
    reports = [liar.prune(model, batches, keep=0.5, progress=False) for model in (plain, dispatched)]
    assert numbers(reports[0]) == numbers(reports[1])
    assert_same(weights_of(plain), weights_of(dispatched))
    assert liar.discover(plain) == liar.discover(dispatched)
    batch = liar.Calibration.of(batches, dispatched).batches[0]
    with torch.no_grad():
        assert torch.equal(plain(**batch)[0], dispatched(**batch)[0])
    for name, model in (("plain", plain), ("dispatched", dispatched)):
        liar.save(model, tmp_path / name)
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("plain", "dispatched")]
    assert files[0] == files[1]
    assert_same(liar.load(tmp_path / "plain").state_dict(), liar.load(tmp_path / "dispatched").state_dict())


def test_single_verbs_give_the_same(pair):
    """Collect, select, reconstruct, remove; each on a model of its own."""
    plain, dispatched = pair
    batches, criteria = tiny_batches(plain), ["reconstruction", "wanda"]
    statistics = [liar.collect(model, batches, criteria=criteria, progress=False) for model in (plain, dispatched)]
    assert statistics[0].norms == statistics[1].norms
    for site, values in statistics[0].sites.items():
        assert_same(values, statistics[1].sites[site])
    for criterion in (*criteria, "magnitude", "random"):
        masks = [liar.select(model, statistics[0], keep=0.6, criterion=criterion) for model in (plain, dispatched)]
        assert masks[0] == masks[1]
    cut = copy.deepcopy(plain)
    liar.remove(cut, masks[0])
    reports = [liar.reconstruct(model, masks[0], batches, progress=False) for model in (plain, dispatched)]
    assert numbers(reports[0]) == numbers(reports[1])
    assert_same(weights_of(plain), weights_of(dispatched))
    with pytest.raises(AssertionError):
        assert_same(weights_of(cut), weights_of(dispatched))


@pytest.mark.parametrize("kind", KINDS)
def test_removing_units_and_weights(kind, tmp_path):
    plain = MODELS["llama"]()
    dispatched, mask = KINDS[kind](plain, tmp_path), liar.select(plain, keep=0.5, criterion="magnitude")
    for model in (plain, dispatched):
        liar.remove(model, mask)
        liar.unstructured.prune(model, sparsity=0.5, criterion="magnitude", progress=False)
        liar.unstructured.prune(model, tiny_batches(plain), sparsity=0.6, progress=False)
    assert_same(weights_of(plain), weights_of(dispatched))


def test_pruning_in_steps_and_repair_after_a_teacher(pair):
    plain, dispatched = pair
    batches = tiny_batches(plain)
    teachers = copy.deepcopy(plain), liar.surgery.copy_dense(dispatched)
    before = weights_of(teachers[1])
    for model in (plain, dispatched):
        liar.prune(model, batches, keep=0.5, steps=2, progress=False)
    assert_same(weights_of(plain), weights_of(dispatched))
    assert_same(weights_of(teachers[1]), before)
    for model, teacher in zip((plain, dispatched), teachers, strict=True):
        liar.reconstruct(model, None, batches, teacher=teacher, progress=False)
    assert_same(weights_of(plain), weights_of(dispatched))


@pytest.mark.parametrize("kind", ["cpu_offload", "on_disk"])
def test_refinement(kind, tmp_path):
    plain = MODELS["llama"]()
    batches, dispatched = tiny_batches(plain), KINDS[kind](plain, tmp_path)
    teachers = copy.deepcopy(plain), liar.surgery.copy_dense(dispatched)
    for model, teacher in zip((plain, dispatched), teachers, strict=True):
        liar.prune(model, batches, keep=0.5, progress=False)
        liar.refine(model, teacher, batches, epochs=2, progress=False)
    assert_same(weights_of(plain), weights_of(dispatched))


@pytest.mark.parametrize("kind", KINDS)
def test_the_hooks_can_be_taken_away_afterwards(kind, tmp_path):
    """What is in host memory is then an ordinary pruned model; what came from files only has its pruned blocks."""
    plain = MODELS["llama"](mlp_bias=True)
    batches, dispatched = tiny_batches(plain), KINDS[kind](plain, tmp_path)
    for model in (plain, dispatched):
        liar.prune(model, batches, keep=0.5, progress=False)
    expected = weights_of(dispatched)
    hooks.remove_hook_from_module(dispatched, recurse=True)
    actual = {name: value for name, value in dispatched.state_dict().items() if not value.is_meta}
    assert_same(actual, {name: value for name, value in expected.items() if name in actual})
    if "offload" in kind or "buffers" in kind:
        assert_same(actual, plain.state_dict())


def test_a_dispatched_model_that_was_not_pruned_is_saved(pair, tmp_path):
    plain, dispatched = pair
    liar.save(dispatched, tmp_path / "saved")
    assert_same(liar.load(tmp_path / "saved").state_dict(), plain.state_dict())
    state = state_of(dispatched)
    assert all(value.is_meta for value in dispatched.get_submodule(layout_of(plain).blocks[0]).parameters())
    assert state_of(dispatched) == state


def test_a_saved_model_is_pruned_again_from_its_folder(tmp_path):
    """A pruned folder of ours as a source, with unequal layers."""
    model = MODELS["llama"]()
    liar.prune(model, tiny_batches(model), keep=0.7, progress=False)
    liar.save(model, tmp_path / "slim")
    again = liar.load(tmp_path / "slim", device_map={"": "disk"})
    assert all(parameter.is_meta for parameter in again.parameters())
    for each in (model, again):
        liar.prune(each, tiny_batches(model), keep=0.7, progress=False)
    assert_same(weights_of(model), weights_of(again))


def test_gradients_of_blocks_that_run_again(pair):
    """Activations and their gradients are those of the ordinary model, and no two blocks have their weights at once."""
    plain, dispatched = pair
    results, present, batches = [], [], tiny_batches(plain)

    def watch(block, blocks):
        there = [any(not p.is_meta for p in each.parameters()) for each in blocks]
        present.append(sum(there))

    for model in (plain, dispatched):
        layout, data = layout_of(model), liar.Calibration.of(batches, model)
        blocks = [model.get_submodule(name) for name in layout.blocks]
        points = {site.name: Point(model.get_submodule(site.module), None) for site in layout.sites}
        with exclusive(model), record_gradients(model, []), recompute_blocks(blocks):
            with capture_activations(points) as activations:
                outputs = outputs_of(model, data, 0)
            handles = [block.register_forward_pre_hook(lambda m, a, b=blocks: watch(m, b)) for block in blocks]
            loss = sum(output.rows.square().sum() for output in outputs)
            results.append((activations, torch.autograd.grad(loss, list(activations.values()))))
            for handle in handles:
                handle.remove()
    assert_same(results[0][0], results[1][0])
    assert all(torch.equal(*each) for each in zip(results[0][1], results[1][1], strict=True))
    assert any(bool(each.any()) for each in results[1][1])
