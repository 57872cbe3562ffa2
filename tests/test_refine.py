"""Gradient reconstruction against plain loops over full models: every granularity and propagation, and what must not move."""

import copy
from dataclasses import replace

import pytest
import torch
from reference import blocks

import liar
from liar.data import FOLDS, Calibration
from liar.models import discover
from liar.options import RefineOptions
from liar.repair.refine import hold_out, refine_windows
from liar.testing import tiny_batches, tiny_model

FAMILIES = ("llama", "bert")
GRANULARITIES = ("matrix", "sublayer", "block", 2)
PROPAGATIONS = ("dense", "pruned", "global")
RATE = 1e-3

# By hand, not from the library's tables: layers of attention and feed-forward part in their order, by the consumer of each.
LAYERS = {
    "llama": {
        "self_attn.o_proj": [f"self_attn.{name}_proj" for name in "qkvo"],
        "mlp.down_proj": ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    },
    "bert": {
        "attention.output.dense": [*(f"attention.self.{name}" for name in ("query", "key", "value")), "attention.output.dense"],
        "output.dense": ["intermediate.dense", "output.dense"],
    },
}
# Where the residual stream after each consumer can be read: the norm that reads it in pre-norm models, the norm after the sum.
STREAMS = {
    "llama": {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": None},
    "bert": {"attention.output.dense": "attention.output.LayerNorm", "output.dense": "output.LayerNorm"},
}


def data_of(model, seed=0):
    """Batches of four sequences of one length: 16 sequences, every fourth held out."""
    return tiny_batches(model, batches=4, sequences=4, padding=None, seed=seed)


def pair(name, keep=None):
    """A dense model and a student: single weights pruned, or cut to a share; in float64: orders of sums do not matter."""
    dense = tiny_model(name, dtype=torch.float64)
    student = copy.deepcopy(dense)
    if keep is None:
        generator = torch.Generator().manual_seed(1)
        for block in blocks(student):
            for names in LAYERS[name].values():
                for layer in names:
                    weight = block.get_submodule(layer).weight.data
                    weight *= torch.rand(weight.shape, generator=generator) > 0.5
    else:
        liar.remove(student, liar.select(dense, data_of(dense), keep=keep, progress=False))
    return dense, student


class Naive:
    """Full models with hooks: nothing is cut into windows, and nothing is kept from one step to the next."""

    def __init__(self, name, dense, student, batches, propagation):
        self.name, self.dense, self.student, self.batches, self.propagation = name, dense, student, batches, propagation

    def observed(self, model, batch, number, points, replaced=()):
        """Run a full model: activations at points (name -> (module of block `number`, "in" or "out")); some modules give known
        tensors."""
        block, result, handles = blocks(model)[number], {}, []
        for module, value in replaced:
            handles.append(module.register_forward_hook(lambda _m, _a, _o, value=value: value))
        for key, (path, side) in points.items():
            module = block.get_submodule(path) if path else block

            def note(_module, args, output=None, key=key, side=side):
                value = args[0] if side == "in" else output
                result[key] = value[0] if isinstance(value, tuple) else value

            handles.append(module.register_forward_pre_hook(note) if side == "in" else module.register_forward_hook(note))
        model.base_model(**batch)
        for handle in handles:
            handle.remove()
        return result

    def entry(self, model, batch, number):
        """What enters a block in a pass of the full model."""
        with torch.no_grad():
            return self.observed(model, batch, number, {"x": ("", "in")})["x"]

    def fed(self, model, number, value, run):
        """`run` while the block reads another value."""
        handle = blocks(model)[number].register_forward_pre_hook(lambda _m, args: (value, *args[1:]))
        try:
            return run()
        finally:
            handle.remove()

    def sides(self, batch, number):
        """What the student's and the teacher's block read."""
        dense, own = self.entry(self.dense, batch, number), self.entry(self.student, batch, number)
        return (dense if self.propagation == "dense" else own), (own if self.propagation == "pruned" else dense)

    def blocks_of(self, batch, start, stop):
        """(prediction, target) of windows of blocks."""
        ours, theirs = self.sides(batch, start)
        point = {"y": ("", "out")}
        given = self.fed(self.student, start, ours, lambda: self.observed(self.student, batch, stop - 1, point)["y"])
        with torch.no_grad():
            target = self.fed(self.dense, start, theirs, lambda: self.observed(self.dense, batch, stop - 1, point)["y"])
        return given, target

    def stream_point(self, consumer):
        path = STREAMS[self.name][consumer]
        return {"y": ("", "out") if path is None else (path, "in")}

    def sublayer(self, batch, number, consumer):
        """(prediction, target) of one sub-layer; what the one before it adds is replaced where the other side's is read."""
        ours, theirs = self.sides(batch, number)
        earlier = list(LAYERS[self.name])[: list(LAYERS[self.name]).index(consumer)]
        replaced = {"ours": [], "theirs": []}
        with torch.no_grad():
            for path in earlier:
                at = {"y": (path, "out")}
                if self.propagation == "dense":
                    value = self.observed(self.dense, batch, number, at)["y"]
                    replaced["ours"].append((blocks(self.student)[number].get_submodule(path), value))
                if self.propagation == "pruned":
                    value = self.observed(self.student, batch, number, at)["y"]
                    replaced["theirs"].append((blocks(self.dense)[number].get_submodule(path), value))
        point = self.stream_point(consumer)
        run = lambda model, key: self.observed(model, batch, number, point, replaced[key])["y"]  # noqa: E731
        given = self.fed(self.student, number, ours, lambda: run(self.student, "ours"))
        with torch.no_grad():
            target = self.fed(self.dense, number, theirs, lambda: run(self.dense, "theirs"))
        return given, target

    def matrix(self, batch, number, path):
        """(prediction, target) of one layer on what it reads: W x in the three ways."""
        with torch.no_grad():
            own = self.observed(self.student, batch, number, {"x": (path, "in")})["x"]
            theirs = self.observed(self.dense, batch, number, {"x": (path, "in")})["x"]
            layer = blocks(self.dense)[number].get_submodule(path)
            target = layer(own if self.propagation == "pruned" else theirs)
        reads = theirs if self.propagation == "dense" else own
        return blocks(self.student)[number].get_submodule(path)(reads), target


def naive_windows(name, granularity):
    """(what is trained as (block, layer), how prediction and target are made)."""
    layers = LAYERS[name]
    everything = [path for paths in layers.values() for path in paths]
    if granularity == "matrix":
        return [([(n, path)], ("matrix", n, path)) for n in range(2) for path in everything]
    if granularity == "sublayer":
        return [([(n, path) for path in layers[c]], ("sublayer", n, c)) for n in range(2) for c in layers]
    if granularity == "block":
        return [([(n, path) for path in everything], ("blocks_of", n, n + 1)) for n in range(2)]
    return [([(n, path) for n in range(2) for path in everything], ("blocks_of", 0, 2))]


def naive_refined(name, dense, student, batches, granularity, propagation):
    """One epoch for every window, a sequence a step: losses of all steps by window, and the trained student."""
    student = copy.deepcopy(student)
    naive, losses = Naive(name, dense, student, batches, propagation), []
    rows = [row for batch in batches for row in batch["input_ids"].split(1)]
    inputs = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    training, held_out = ([each for i, each in enumerate(inputs) if bool(i % FOLDS) == side] for side in (True, False))
    for trained, (kind, *where) in naive_windows(name, granularity):
        parameters = [p for n, path in trained for p in blocks(student)[n].get_submodule(path).parameters()]
        initial, zeros = [p.detach().clone() for p in parameters], [(p == 0) & (p.ndim > 1) for p in parameters]

        def loss(batch, kind=kind, where=where):
            given, target = getattr(naive, kind)(batch, *where)
            return (given - target).square().mean()

        def error(loss=loss):
            with torch.no_grad():
                return sum(float(loss(batch)) for batch in held_out)

        before, optimizer = error(), torch.optim.Adam(parameters, lr=RATE)
        losses.append([])
        for step, place in enumerate(torch.randperm(len(training), generator=torch.Generator().manual_seed(0)).tolist()):
            optimizer.param_groups[0]["lr"] = RATE * (1 - step / len(training))
            value = loss(training[place])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            for parameter, zero in zip(parameters, zeros, strict=True):
                parameter.data[zero] = 0
            losses[-1].append(float(value))
        if not error() < before:
            for parameter, value in zip(parameters, initial, strict=True):
                parameter.data.copy_(value)
    return losses, student


OPTIONS = RefineOptions(epochs=1, sequences=1, learning_rate=RATE)


def refined_by_library(dense, student, batches, options):
    """The walk alone, without the guard of the whole model; the trained student."""
    student = copy.deepcopy(student)
    data = hold_out(Calibration.of(batches, student), options.sequences)
    result = refine_windows(student, discover(student), dense, discover(dense), data, options)
    result.write(student)
    return result, student


@pytest.mark.parametrize("propagation", PROPAGATIONS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", FAMILIES)
def test_losses_and_weights_are_those_of_plain_loops(name, granularity, propagation):
    """Masks of single weights, so that every layer has a target: the losses of all twelve steps of every window."""
    dense, student = pair(name)
    batches = data_of(dense)
    options = replace(OPTIONS, granularity=granularity, propagation=propagation)
    losses, expected = naive_refined(name, dense, student, batches, granularity, propagation)
    result, actual = refined_by_library(dense, student, batches, options)
    assert [len(each) for each in losses] == [12] * len(losses)
    torch.testing.assert_close([outcome.course.losses for outcome in result.outcomes], losses, rtol=1e-9, atol=1e-12)
    trained = {f"{name}.{kind}" for name in result.values for kind in ("weight", "bias")}
    assert trained, "nothing was better: the comparison of weights would be empty"
    before, wanted = student.state_dict(), expected.state_dict()
    for key, value in actual.state_dict().items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-7, atol=1e-9)
        assert key in trained or torch.equal(value, before[key]), key
