"""Gradient reconstruction against plain loops over full models: every granularity and propagation, and what must not move."""

import copy
from dataclasses import replace
from importlib import import_module
from math import inf

import pytest
import torch
from reference import blocks

import liar
from liar.data import FOLDS, Calibration
from liar.errors import CalibrationError, LiarError, OptionError
from liar.models import layout_of
from liar.options import RefineOptions
from liar.repair.refine import hold_out, last_hidden_error, refine_windows
from liar.repair.refine.training import rate
from liar.testing import assert_same_state, model_state, tiny_batches, tiny_model
from liar.verdicts import Verdict

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
    result = refine_windows(student, layout_of(student), dense, layout_of(dense), data, options)
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


@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_windows_that_overlap_read_what_the_window_before_left(propagation):
    """Three blocks in windows of two: the second window starts at block 1, as the first left it."""
    dense = tiny_model("llama", num_hidden_layers=3, dtype=torch.float64)
    student = copy.deepcopy(dense)
    liar.remove(student, liar.select(dense, data_of(dense), keep=0.6, progress=False))
    batches = data_of(dense)
    data = hold_out(Calibration.of(batches, student), OPTIONS.sequences)
    options = replace(OPTIONS, granularity=2, propagation=propagation)
    result, trained = refined_by_library(dense, student, batches, options)
    assert [(each.window.name, each.window.start, each.window.stop) for each in result.outcomes] == [
        ("window.0", 0, 2),
        ("window.1", 1, 3),
    ]
    # The error of the second window as it ended, from full models.
    naive = Naive("llama", dense, trained, batches, propagation)
    with torch.no_grad():
        pairs = [naive.blocks_of(data.calibration.batches[number], 1, 3) for number in data.held_out]
        streams = [naive.sides(data.calibration.batches[number], 1)[0] for number in data.held_out]
    error = sum(float((given - target).square().sum()) for given, target in pairs)
    size = sum(float((target - stream).square().sum()) for (_, target), stream in zip(pairs, streams, strict=True))
    last = result.outcomes[-1]
    if propagation == "dense" and last.verdict is Verdict.REFINED:
        assert last.after == pytest.approx(error / size, rel=1e-9)
    if propagation != "dense":
        # What enters block 1 is from block 0 after the first window: nothing changed it since.
        assert last.after == pytest.approx(error / size, rel=1e-9)


def slim_pair(name="llama", **config):
    dense = tiny_model(name, **config)
    slim, batches = copy.deepcopy(dense), tiny_batches(dense, batches=6, sequences=8)
    liar.prune(slim, batches, keep=0.5, progress=False)
    return dense, slim, batches


TRAIN = {"epochs": 3, "learning_rate": 3e-3, "progress": False}


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_slim_models_get_no_worse(name, granularity):
    """Not a window, not the whole model; what is not a layer of a site stays bitwise, and the teacher too."""
    dense, slim, batches = slim_pair(name)
    data = hold_out(Calibration.of(batches, slim), 8)
    before, state, teacher = last_hidden_error(slim, dense, data), slim.state_dict(), model_state(dense)
    values = {key: value.clone() for key, value in state.items()}
    report = liar.refine(slim, dense, batches, granularity=granularity, **TRAIN)
    assert last_hidden_error(slim, dense, data) <= before
    assert all(site.after <= site.before for site in report.sites)
    assert_same_state(dense, teacher)
    trained = {
        f"{block}.{layer}"
        for block in layout_of(slim).blocks
        for site in layout_of(slim).of_block(block)
        for layer in (*site.inputs, site.consumer.module)
    }
    for key, value in slim.state_dict().items():
        assert key.rpartition(".")[0].removeprefix("model.") in trained or torch.equal(value, values[key]), key
    refined = {site.site for site in report.sites if site.verdict is Verdict.REFINED}
    assert refined or all(torch.equal(value, values[key]) for key, value in slim.state_dict().items())


def test_only_a_refined_window_moves():
    dense, slim, batches = slim_pair()
    before = {key: value.clone() for key, value in slim.state_dict().items()}
    report = liar.refine(slim, dense, batches, **TRAIN)
    moved = {key for key, value in slim.state_dict().items() if not torch.equal(value, before[key])}
    kept = [site for site in report.sites if site.verdict is not Verdict.REFINED]
    for site in kept:
        kind = "self_attn" if site.site.startswith("heads") else "mlp"
        block = site.module.rpartition(f".{kind}")[0]
        assert not [key for key in moved if key.startswith(f"{block}.{kind}")], site


def test_zeros_of_weights_stay():
    dense, student = pair("llama")
    zero = {key: value == 0 for key, value in student.state_dict().items() if "proj" in key}
    report = liar.refine(student, dense, data_of(dense), sequences=2, **TRAIN)
    assert Verdict.REFINED in report.verdicts.values()
    for key, mask in zero.items():
        assert torch.equal(student.state_dict()[key] == 0, mask), key


def test_training_stops_early_and_keeps_the_best():
    dense, student = pair("llama")
    options = RefineOptions(granularity="block", epochs=40, sequences=2, learning_rate=3e-2, patience=2)
    result, _ = refined_by_library(dense, student, data_of(dense), options)
    for outcome in result.outcomes:
        errors = [error for _, error in outcome.course.held_out]
        best = errors.index(min(errors))
        assert len(errors) == best + 1 + 2, "two epochs after the best"
        # Four batches of three sequences, in steps of at most two.
        assert len(outcome.course.losses) == 8 * (len(errors) - 1) < 8 * 40
        assert outcome.after / outcome.before == pytest.approx(min(errors) / errors[0])


def test_the_learning_rate_rises_and_falls():
    assert [rate(step, 10, 2) for step in (0, 1, 2, 3, 9)] == [0.5, 1.0, 1.0, 7 / 8, 1 / 8]
    assert [rate(step, 4, 0) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]


def test_what_helps_no_one_is_undone():
    """A learning rate that throws every window off: all weights are the very same objects."""
    dense, slim, batches = slim_pair()
    before = {key: id(value) for key, value in slim.named_parameters()}
    report = liar.refine(slim, dense, batches, epochs=1, learning_rate=1.0, progress=False)
    assert set(report.verdicts.values()) <= {Verdict.KEPT_BASELINE, Verdict.UNTOUCHED}
    assert all(site.after == site.before and site.ridge == inf for site in report.sites)
    assert {key: id(value) for key, value in slim.named_parameters()} == before


def test_windows_that_are_better_in_a_model_that_is_not_are_undone(monkeypatch):
    refinement = import_module("liar.api.refine")

    dense, slim, batches = slim_pair()
    state, errors = model_state(slim), iter([1.0, 2.0])
    monkeypatch.setattr(refinement, "last_hidden_error", lambda *_: next(errors))
    report = liar.refine(slim, dense, batches, **TRAIN)
    assert Verdict.UNDONE in report.verdicts.values()
    assert Verdict.REFINED not in report.verdicts.values()
    assert_same_state(slim, state)
    assert "all weights are as they" in str(report)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_lora_is_merged(name):
    pytest.importorskip("peft")
    dense = tiny_model(name)
    slim, batches = copy.deepcopy(dense), tiny_batches(dense, batches=6, sequences=8)
    liar.remove(slim, liar.select(dense, batches, keep=0.5, progress=False))
    classes = [type(module) for module in slim.modules()]
    before = {key: value.clone() for key, value in slim.state_dict().items()}
    report = liar.refine(slim, dense, batches, granularity="block", lora=2, **{**TRAIN, "epochs": 8})
    assert [type(module) for module in slim.modules()] == classes
    assert slim.state_dict().keys() == before.keys()
    assert Verdict.REFINED in report.verdicts.values()
    for key, value in slim.state_dict().items():
        if not torch.equal(value, before[key]):
            assert torch.linalg.matrix_rank((value - before[key]).float(), rtol=1e-3) <= 2, key
    assert all(each.requires_grad for each in slim.parameters())


def test_lora_without_peft(monkeypatch):
    from liar.repair.refine import lora  # noqa: PLC0415 (is patched)

    monkeypatch.setattr(lora, "find_spec", lambda _: None)
    dense, slim, batches = slim_pair()
    with pytest.raises(OptionError, match=r"lora=2 needs peft.*liar-prune\[lora\]"):
        liar.refine(slim, dense, batches, lora=2, progress=False)


def test_bfloat16_is_trained_in_more_bits():
    """Updates are below the spacing of 16-bit weights; what is stored, and reported, are weights of the model's type."""
    dense, slim, batches = slim_pair(dtype=torch.bfloat16)
    report = liar.refine(slim, dense, batches, granularity="block", **TRAIN)
    assert {each.dtype for each in slim.parameters()} == {torch.bfloat16}
    assert report.dtype == "bfloat16"
    assert Verdict.REFINED in report.verdicts.values()


def test_same_seed_same_weights():
    results = []
    for seed in (0, 0, 1):
        dense, slim, batches = slim_pair()
        liar.refine(slim, dense, batches, seed=seed, **TRAIN)
        results.append(torch.cat([each.flatten() for each in slim.parameters()]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_the_report_is_read_again():
    dense, slim, batches = slim_pair()
    for granularity in GRANULARITIES:
        report = liar.refine(slim, dense, batches, granularity=granularity, epochs=1, progress=False)
        again = liar.Report.from_json(report.to_json())
        assert again.verdicts == report.verdicts
        assert report.options["granularity"] == granularity
        assert report.achieved == pytest.approx(layout_of(slim).parameters / layout_of(dense).parameters)


def test_progress_and_an_error_that_it_raises():
    dense, slim, batches = slim_pair()
    updates, state = [], model_state(slim)
    liar.refine(copy.deepcopy(slim), dense, batches, epochs=2, progress=updates.append)
    assert updates[-1].fraction == 1.0
    assert {each.verb for each in updates} == {"refine"}
    assert len({each.fraction for each in updates}) >= 5

    def stop(update):
        if update.fraction == 1.0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        liar.refine(slim, dense, batches, epochs=2, progress=stop)
    assert_same_state(slim, state)


BAD = {
    "granularity beyond the model": (
        {"granularity": 3}, None, OptionError, "granularity=3: the model has 2 blocks: expected at most as many"
    ),
    "unknown granularity": ({"granularity": "row"}, None, OptionError, "granularity='row': expected one of 'matrix', 'sub"),
    "no blocks": ({"granularity": 0}, None, OptionError, "granularity=0: expected a whole number"),
    "unknown propagation": ({"propagation": "both"}, None, OptionError, "propagation='both' is not known"),
    "rate": ({"learning_rate": 0}, None, OptionError, "learning_rate=0: expected a learning rate"),
    "too little to hold out": ({}, 1, CalibrationError, "has 1 sequences, of which 1 can be held out and 0 trained on"),
    "copies": ({}, "copies", CalibrationError, "copies stay together"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    options, data, kind, message = BAD[name]
    dense, slim, batches = slim_pair()
    state = model_state(slim)
    if data == 1:
        batches = tiny_batches(dense, batches=1, sequences=1)
    if data == "copies":
        row = tiny_batches(dense, batches=1, sequences=1, padding=None)[0]
        batches = [{key: value.expand(8, -1) for key, value in row.items()}]
    with pytest.raises(LiarError, match=message) as caught:
        liar.refine(slim, dense, batches, progress=False, **options)
    assert isinstance(caught.value, kind)
    assert_same_state(slim, state)


def test_activations_that_are_not_finite():
    dense, slim, batches = slim_pair()
    with torch.no_grad():
        slim.get_submodule(layout_of(slim)["neurons.1"].module).weight[0, 0] = torch.nan
    with pytest.raises(CalibrationError, match=r"neurons\.1 .*: activations are NaN or infinite"):
        liar.refine(slim, dense, batches, progress=False)


def test_held_out_sequences_are_whole_and_others():
    model = tiny_model("bert")
    data = hold_out(Calibration.of(tiny_batches(model, batches=5, sequences=7), model), 3)
    rows = [
        {tuple(row.tolist()) for number in side for row in data.calibration.batches[number]["input_ids"]}
        for side in (data.training, data.held_out)
    ]
    assert not rows[0] & rows[1]
    assert len(rows[0]) + len(rows[1]) == 35
    assert 5 <= len(rows[1]) <= 13
    assert max(len(batch["input_ids"]) for batch in data.calibration.batches) <= 3
