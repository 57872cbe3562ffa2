"""Models that accelerate has dispatched: the same answers as for ordinary ones, hooks that still work, and clear errors."""

import copy
import gc
import json
import weakref
from collections import Counter
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import liar
from benchmarks.offload import can_limit, measure
from benchmarks.speed import random_llama
from liar.errors import ModelError
from liar.models import compute_device, count_parameters, layout_of, on_device, plain_block
from liar.planning.imitation import Tally
from liar.progress import Progress
from liar.runtime import OnDisk, Point, Workspace, capture_activations, outputs_of, recompute_blocks, record_gradients
from liar.selection import CRITERIA
from liar.selection.collect import COLLECTORS, stages_of
from liar.selection.fisher import sensitivities
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
    """Activations at the sites and their gradients are those of the ordinary model without the second run."""
    plain, dispatched = pair
    batches, results = tiny_batches(plain), []
    for model in (plain, dispatched):
        layout, data = layout_of(model), liar.Calibration.of(batches, model)
        points = {site.name: Point(model.get_submodule(site.module), None) for site in layout.sites}
        with ExitStack() as stack:
            first = [model.get_submodule(site.module).weight for site in layout.first_sites]
            stack.enter_context(record_gradients(model, first if model is plain else []))
            if model is dispatched:
                stack.enter_context(recompute_blocks([model.get_submodule(name) for name in layout.blocks]))
            with capture_activations(points) as activations:
                outputs = outputs_of(model, data, 0)
            loss = sum(output.rows.square().sum() for output in outputs)
            results.append((activations, torch.autograd.grad(loss, list(activations.values()))))
    assert_same(*(activations for activations, _ in results))
    assert all(torch.equal(*each) for each in zip(results[0][1], results[1][1], strict=True))
    assert any(bool(each.any()) for each in results[1][1])


class Watched(dict):
    """A map of weights that hands out copies, and notes of how many blocks there are some at every time."""

    def __init__(self, module, block, alive, counts):
        super().__init__({name: module._hf_hook.weights_map[name] for name, _ in module.named_parameters(recurse=False)})
        self.block, self.alive, self.counts = block, alive, counts

    def __getitem__(self, name):
        value = super().__getitem__(name).clone()
        self.alive[self.block] += 1
        weakref.finalize(value.untyped_storage(), self.gone)
        self.counts.append(sum(number > 0 for number in self.alive.values()))
        return value

    def gone(self):
        self.alive[self.block] -= 1


@pytest.mark.parametrize("again", [True, False])
def test_weights_of_one_block_are_there_at_a_time(again, tmp_path):
    """In a pass forward and back; the negative control keeps those of all blocks for the way back."""
    plain = MODELS["llama"](num_hidden_layers=4)
    model, alive, counts = cpu_offload(plain, tmp_path), Counter(), []
    blocks = [model.get_submodule(name) for name in layout_of(model).blocks]
    for number, block in enumerate(blocks):
        for module in block.modules():
            if "_hf_hook" in vars(module) and module._hf_hook.offload:
                module._hf_hook.weights_map = Watched(module, number, alive, counts)
    blocks[0].register_forward_pre_hook(lambda _, args: args[0].requires_grad_())
    data = liar.Calibration.of(tiny_batches(plain), model)
    with record_gradients(model, []), recompute_blocks(blocks) if again else nullcontext():
        points = {str(number): Point(block.mlp.down_proj, None) for number, block in enumerate(blocks)}
        with capture_activations(points) as activations:
            loss = outputs_of(model, data, 0)[0].rows.sum()
        torch.autograd.grad(loss, list(activations.values()))
    assert (max(counts) == 1) is again, max(counts)
    del activations, loss
    gc.collect()
    assert not any(alive.values())


def peak(layers, criterion, where, folder):
    """Bytes of tensors at the peak of collecting statistics of a model of so many layers."""
    model, batches = random_llama(2_048, width=128, feed_forward=352, layers=layers)
    elsewhere = where == "disk"
    model = disk_offload(model, folder) if elsewhere else model
    needs = CRITERIA[criterion].needs
    workspace = Workspace(OnDisk(folder) if elsewhere else None)
    data, progress = liar.Calibration.of(batches, model), Progress("collect", stages_of([criterion]), show=False)
    with Tally() as tally:
        if needs == "curves":
            sensitivities(model, layout_of(model), data, progress, workspace.new_store())
        else:
            COLLECTORS[needs](model, layout_of(model), data, progress, workspace)
    return tally.peak


@pytest.mark.parametrize("criterion", ["fluctuation", "reconstruction"])
@pytest.mark.parametrize("where", ["disk", "memory"])
def test_a_pass_of_the_selection_holds_no_more_with_more_layers(criterion, where, tmp_path):
    """Where weights and activations are on disk; the negative control has them in memory, where gradients are of all layers.

    The garbage collector decides when weights that were read are gone, so the peak varies by a few blocks.
    """
    few, many = (peak(layers, criterion, where, tmp_path / str(layers)) for layers in (2, 16))
    assert (many < 1.5 * few) is (where == "disk" or criterion == "fluctuation"), (few, many)


def interrupted(model, batches, after):
    """Prune, with an error after so many messages of progress."""
    told = []

    def tell(update):
        told.append(update)
        if len(told) == after:
            raise KeyboardInterrupt

    liar.prune(model, batches, keep=0.5, progress=tell)
    return len(told)


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_leaves_the_model_as_it_was(kind, tmp_path):
    """Whenever it happens: in a pass through the model, in the walk, after the blocks have been cut."""
    plain = MODELS["llama"]()
    model, batches = KINDS[kind](plain, tmp_path), tiny_batches(plain)
    whole = interrupted(KINDS[kind](plain, tmp_path), batches, None)
    before, weights = state_of(model), weights_of(model)
    for after in range(1, whole + 1):
        with pytest.raises(KeyboardInterrupt):
            interrupted(model, batches, after)
        assert state_of(model) == before
    assert_same(weights_of(model), weights)
    liar.prune(plain, batches, keep=0.5, progress=False)
    liar.prune(model, batches, keep=0.5, progress=False)
    assert_same(weights_of(model), weights_of(plain))


def preloaded(folder):
    return accelerate.cpu_offload(MODELS["llama"](), preload_module_classes=["LlamaMLP"])


def without_values(folder):
    return MODELS["llama"]().to("meta")


def with_another_hook(folder):
    model = MODELS["llama"]()
    hooks.add_hook_to_module(model.model.layers[0].mlp, hooks.CpuOffload("cpu"))
    return model


def with_one_more_hook(folder):
    model = cpu_offload(MODELS["llama"](), folder)
    hooks.add_hook_to_module(model.model.layers[1].mlp.up_proj, hooks.ModelHook(), append=True)
    return model


def patched_before(folder):
    model = MODELS["llama"]()
    layer = model.model.layers[0].mlp.up_proj
    layer.forward = partial(type(layer).forward, layer)
    return accelerate.cpu_offload(model)


def patched_after(folder):
    model = cpu_offload(MODELS["llama"](), folder)
    layer = model.model.layers[0].mlp.up_proj
    layer.forward = partial(layer.forward)
    return model


def in_8_bits(folder):
    model = MODELS["llama"]()
    layer = model.model.layers[1].mlp.down_proj
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    return accelerate.cpu_offload(model)


REFUSED = {
    preloaded: r"layers\.0\.mlp was dispatched with preload_module_classes",
    without_values: "the model is on the meta device: .*embed_tokens.weight has no values",
    with_another_hook: r"layers\.0\.mlp has a forward of its own, set on the instance",
    with_one_more_hook: r"layers\.1\.mlp\.up_proj has a forward of its own",
    patched_before: r"layers\.0\.mlp\.up_proj has a forward of its own",
    patched_after: r"layers\.0\.mlp\.up_proj has a forward of its own",
    in_8_bits: r"down_proj is a Linear, expected .* in float32",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_what_cannot_be_taken_apart_is_refused(make, tmp_path):
    model, batches = make(tmp_path), tiny_batches(MODELS["llama"]())
    before = state_of(model)
    for work in (
        lambda: liar.prune(model, batches, keep=0.5, progress=False),
        lambda: liar.select(model, keep=0.5, criterion="magnitude"),
        lambda: liar.save(model, tmp_path / "out"),
    ):
        with pytest.raises(ModelError, match=REFUSED[make]):
            work()
        assert state_of(model) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["on_disk", "disk_offload", "mixed"])
def test_files_that_are_gone_or_cut_off(kind, tmp_path):
    plain = MODELS["llama"]()
    model, batches = KINDS[kind](plain, tmp_path), tiny_batches(plain)
    before, mask = state_of(model), liar.select(plain, keep=0.5, criterion="magnitude")
    place = tmp_path / ("offloaded" if kind == "disk_offload" else "model")
    contents = {file: file.read_bytes() for file in place.iterdir() if file.suffix in (".dat", ".safetensors")}
    for damage in (lambda file: file.unlink(), lambda file: file.write_bytes(contents[file][:-100])):
        for file in contents:
            damage(file)
        for work in (
            lambda: liar.prune(model, batches, keep=0.5, progress=False),
            lambda: liar.collect(model, batches, criteria=["wanda"], progress=False),
            lambda: liar.reconstruct(model, mask, batches, progress=False),
            lambda: liar.remove(model, mask),
            lambda: liar.save(model, tmp_path / "out"),
        ):
            with pytest.raises(ModelError, match=r"cannot (be )?read .*have to stay (where|as) they were; load it again"):
                work()
            assert state_of(model) == before
            assert not (tmp_path / "out").exists()
        for file, content in contents.items():
            file.write_bytes(content)
    assert liar.prune(model, batches, keep=0.5, progress=False).achieved <= 0.5


@pytest.mark.parametrize("criterion", ["snip", "taylor", "fisher"])
def test_criteria_that_need_all_weights_at_once(criterion, tmp_path):
    plain = MODELS["llama"]()
    model = cpu_offload(plain, tmp_path)
    message = f"gradients of weights \\({criterion}\\) need all weights .*another criterion: reconstruction, fluctuation, wanda"
    with pytest.raises(ModelError, match=message):
        liar.prune(model, tiny_batches(plain), keep=0.5, criterion=criterion, progress=False)
    with pytest.raises(ModelError, match="choose a budget in parameters"):
        liar.latency(model, length=4, progress=False)


def test_weights_in_host_memory_are_let_go(tmp_path):
    """What a model no longer has after it was pruned is in no hook either; on an error all of it is still there."""
    plain = MODELS["llama"]()
    model, batches = cpu_offload(plain, tmp_path), tiny_batches(plain)
    layer = model.model.layers[0].mlp.down_proj
    alive = weakref.ref(layer._hf_hook.weights_map["weight"])
    with pytest.raises(KeyboardInterrupt):
        interrupted(model, batches, 3)
    assert alive() is layer._hf_hook.weights_map["weight"]
    liar.prune(model, batches, keep=0.5, progress=False)
    gc.collect()
    assert alive() is None


def test_files_of_an_offloaded_model_are_mapped_and_not_read(tmp_path):
    """On the CPU: the values of a block are pages of its files."""
    model = disk_offload(MODELS["llama"](), tmp_path)
    block = plain_block(model.model.layers[0])
    assert "_hf_hook" not in vars(block.mlp.up_proj)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("/proc/self/maps says what is mapped on Linux only")
    assert str(tmp_path / "offloaded" / "model.layers.0.mlp.up_proj.weight.dat") in maps.read_text()
    assert model.model.layers[0].mlp.up_proj.weight.is_meta


@pytest.mark.parametrize("kind", KINDS)
def test_offloaded_models_are_planned(kind, tmp_path):
    model = MODELS["llama"]()
    batches = tiny_batches(model)
    dispatched = KINDS[kind](model, tmp_path)
    options = {"keep": 0.57, "measure": False}
    plan = liar.plan(dispatched, batches, **options)
    assert plan.memory == liar.plan(model, batches, offload=True, **options).memory
    assert plan.memory != liar.plan(model, batches, **options).memory
    liar.prune(dispatched, batches, keep=0.57, activations="auto", progress=False)
    assert dispatched.num_parameters() < model.num_parameters()


def test_parts_of_a_dispatched_model(tmp_path):
    plain = MODELS["tied llama"]()
    model = cpu_offload(plain, tmp_path)
    assert compute_device(model) == compute_device(plain) == torch.device("cpu")
    assert count_parameters([model]) == count_parameters([plain])
    block = model.model.layers[0]
    assert plain_block(plain.model.layers[0]) is plain.model.layers[0]
    copied = plain_block(block, torch.device("meta"))
    assert {parameter.device.type for parameter in copied.parameters()} == {"meta"}
    assert copied.self_attn.config is block.self_attn.config
    assert on_device(copied, torch.device("meta")) is copied
    moved = on_device(plain.model.layers[0], torch.device("meta"))
    assert {parameter.device.type for parameter in moved.parameters()} == {"meta"}
    assert {parameter.device.type for parameter in plain.model.layers[0].parameters()} == {"cpu"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: weights on the host, and one block at a time on it")
def test_weights_on_the_host_and_blocks_on_a_gpu(tmp_path):
    plain = MODELS["llama"](num_hidden_layers=4)
    model, batches = accelerate.cpu_offload(copy.deepcopy(plain), execution_device="cuda"), tiny_batches(plain)
    plain.to("cuda")
    reports = [liar.prune(each, batches, keep=0.5, progress=False) for each in (plain, model)]
    assert [site.kept for site in reports[0].sites] == [site.kept for site in reports[1].sites]
    for name, value in weights_of(model).items():
        assert value.device.type == "cpu"
        torch.testing.assert_close(value, plain.state_dict()[name].cpu())
    batch = {name: value.to("cuda") for name, value in batches[0].items()}
    torch.testing.assert_close(model(**batch)[0], plain(**batch)[0])


@pytest.mark.skipif(not can_limit(), reason="needs /sys/fs/cgroup/memory (version 1), where a group with a limit can be made")
def test_a_model_larger_than_the_memory_it_may_take(tmp_path, monkeypatch):
    """Pruned and saved within half of the model and the statistics; in memory, as the negative control, it is killed."""
    # Of so small a model the gaps that glibc's heap leaves would decide.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**20))
    run = measure(tmp_path, width=512, tokens=256)
    assert run["arms"]["on disk"]["finished"], run
    assert not run["arms"]["in memory"]["finished"], run
    assert run["arms"]["on disk"]["weights"] == run["arms"]["in memory, no limit"]["weights"]
