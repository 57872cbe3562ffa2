"""The walk over blocks: what steps see, where they plug in, and a dense stream that comes from another model."""

import copy
from functools import partial
from math import inf

import pytest
import reference
import torch
from cases import MODELS

import liar
from liar.data import FOLDS, Calibration
from liar.errors import ModelError
from liar.models import layer_of, layout_of
from liar.options import TARGETS, ReconstructOptions
from liar.repair import RepairContext, RepairStep, apply_steps, closed_form_steps, walk_blocks
from liar.repair import context as context_module
from liar.runtime import preserve_model_state
from liar.solve import fit, fit_damped
from liar.solve.ridge import MIDDLE
from liar.statistics import Folds, Moments
from liar.testing import assert_same_state, model_state, tiny_batches, tiny_model

NAMES = ["bert", "llama-8q-2kv", "gpt2-lm"]


def every_other(model):
    return liar.Mask({site.name: torch.arange(site.units) % 2 == 0 for site in layout_of(model).sites})


def walked(model, mask, batches, steps, **options):
    """A copy of the model after a walk."""
    model = copy.deepcopy(model)
    apply_steps(model, layout_of(model), Calibration.of(batches, model), steps, mask, **options)
    return model


def last_hidden(model, batches):
    with torch.no_grad():
        return torch.cat([model.base_model(**batch)[0][batch["attention_mask"].bool()] for batch in batches])


def distance(model, other, batches):
    return float((last_hidden(model, batches) - last_hidden(other, batches)).square().mean())


class ScaleUnits(RepairStep):
    """One scale per kept unit, by least squares on the residual stream: the toy step of the tests."""

    captures = frozenset({"stream"})

    def observe(self, site, batch, dense):
        site.put("target", batch, dense["stream"])

    def repair(self, site):
        weight, units = site.consumer.matrix.double(), int(site.unit_mask.sum())
        gram, cross = torch.zeros(units, units).double(), torch.zeros(units).double()
        for batch, pruned in site.run_pruned("consumer_input", "residual"):
            tokens = site.tokens(batch)
            x = tokens.gather(pruned["consumer_input"]).double().unflatten(1, (units, -1))
            added = torch.einsum("tuw,uwo->tuo", x, weight.unflatten(0, (units, -1)))
            missing = (
                tokens.gather(site.get("target", batch) - pruned["residual"]).double() - site.consumer.initial_weights()[1]
            )
            gram += torch.einsum("tuo,tvo->uv", added, added)
            cross += torch.einsum("tuo,to->u", added, missing)
        scales = torch.linalg.solve(gram + 1e-3 * gram.diagonal().mean() * torch.eye(units), cross)
        site.consumer.write(
            weight * scales.repeat_interleave(len(weight) // units)[:, None], site.consumer.initial_weights()[1]
        )


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_ones_own_plugs_in(name):
    """Without touching the library; it repairs, and less than all that least squares can do."""
    model = tiny_model(**MODELS[name])
    batches, new = tiny_batches(model, batches=6, sequences=16), tiny_batches(model, seed=5)
    mask, cut, fitted = every_other(model), copy.deepcopy(model), copy.deepcopy(model)
    liar.remove(cut, mask)
    liar.reconstruct(fitted, mask, batches, progress=False)
    scaled = walked(model, mask, batches, [ScaleUnits()])
    errors = [distance(each, model, new) for each in (fitted, scaled, cut)]
    assert errors == sorted(errors), errors
    assert layout_of(scaled).parameters == layout_of(fitted).parameters


class Watch(RepairStep):
    """Notes everything it is called for."""

    captures = frozenset({"producer_input", "consumer_input", "consumer_output", "residual", "stream"})

    def __init__(self):
        self.calls, self.dense, self.pruned = [], {}, {}

    def observe(self, site, batch, dense):
        self.calls.append(("observe", site.name, batch))
        assert set(dense) == self.captures
        self.dense.setdefault(site.name, []).append(
            {name: value[site.calibration.token_masks[batch]] for name, value in dense.items()}
        )

    def before_cut(self, site):
        self.calls.append(("before_cut", site.name))
        assert layer_of(site.pruned_block, site.site.consumer).size("in") == site.site.units * site.site.consumer.width

    def repair(self, site):
        self.calls.append(("repair", site.name))
        assert site.consumer.size("in") == int(site.unit_mask.sum()) * site.site.consumer.width
        for batch, pruned in site.run_pruned("consumer_input", "residual"):
            mask = site.calibration.token_masks[batch]
            self.pruned.setdefault(site.name, []).append({name: value[mask] for name, value in pruned.items()})

    def skip(self, site):
        self.calls.append(("skip", site.name))


@pytest.mark.parametrize("name", NAMES)
def test_steps_see_what_full_models_compute(name):
    """Dense activations are those of the dense model, pruned ones those of the model cut so far, by plain hooks."""
    model = tiny_model(**MODELS[name], dtype=torch.float64)
    batches, mask, watch = tiny_batches(model, batches=2), every_other(model), Watch()
    walked(model, mask, batches, [watch])
    keep = {kind: [mask[f"{kind}.{layer}"].tolist() for layer in range(2)] for kind in ("heads", "neurons")}
    cut = reference.masked(model, keep)
    for layer in range(2):
        for kind in keep:
            dense, pruned = (reference.activations(m, batches, layer, kind) for m in (model, cut))
            seen = {capture: torch.cat([row[capture] for row in watch.dense[f"{kind}.{layer}"]]) for capture in Watch.captures}
            for capture, column in (("consumer_input", "x"), ("consumer_output", "y"), ("residual", "r")):
                torch.testing.assert_close(seen[capture].numpy(), dense[column])
            torch.testing.assert_close(seen["stream"].numpy(), dense["r"] + dense["y"])
            first = reference.PRODUCERS[model.config.model_type][kind][0]
            reads, _ = reference.reads_and_writes(model, batches, layer, first)
            torch.testing.assert_close(seen["producer_input"].numpy(), reads)
            kept = reference.kept_channels(model, layer, kind, keep[kind][layer])
            own = {
                capture: torch.cat([row[capture] for row in watch.pruned[f"{kind}.{layer}"]])
                for capture in ("consumer_input", "residual")
            }
            torch.testing.assert_close(own["consumer_input"].numpy(), pruned["x"][:, kept])
            torch.testing.assert_close(own["residual"].numpy(), pruned["r"])


def test_the_order_of_calls():
    model, watch = tiny_model("bert"), Watch()
    mask = every_other(model)
    whole = liar.Mask({name: torch.ones_like(units) if name == "heads.0" else units for name, units in mask.masks.items()})
    walked(model, whole, tiny_batches(model, batches=2), [watch])
    observed = [("observe", f"{kind}.0", batch) for batch in range(2) for kind in ("heads", "neurons")]
    assert watch.calls[:4] == observed
    assert watch.calls[4:7] == [("skip", "heads.0"), ("before_cut", "neurons.0"), ("repair", "neurons.0")]
    assert [call[:2] for call in watch.calls[11:]] == [
        (what, name) for name in ("heads.1", "neurons.1") for what in ("before_cut", "repair")
    ]


def test_a_walk_without_a_mask_cuts_nothing():
    model, watch = tiny_model("llama"), Watch()
    watch.before_cut = watch.repair = lambda site: watch.calls.append(("visit", site.name))
    before = model_state(model)
    layout = layout_of(model)
    with preserve_model_state(model):
        assert walk_blocks(model, layout, Calibration.of(tiny_batches(model, batches=1), model), [watch]) == []
    assert ("skip", "heads.0") not in watch.calls
    assert_same_state(model, before)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", ["damped_stream", "residual_stream"])
def test_the_teacher_may_be_another_model(name, target):
    """A model that was cut elsewhere, its removed weights gone, against its dense original: as if the mask were known.

    With the damped target what a layer gives with all its units comes from the teacher.
    """
    dense = tiny_model(**MODELS[name], dtype=torch.float64)
    batches, mask = tiny_batches(dense, batches=6, sequences=16), every_other(dense)
    cut, expected = copy.deepcopy(dense), copy.deepcopy(dense)
    liar.remove(cut, mask)
    liar.reconstruct(expected, mask, batches, ridge=0.01, refit=False, target="residual_stream", progress=False)
    if target == "damped_stream":
        keep = {kind: [mask[f"{kind}.{layer}"].tolist() for layer in range(2)] for kind in ("heads", "neurons")}
        full = reference.residual_stream(dense, keep, batches, 0.01, producers=False, taught=True)
    everything = liar.Mask({site.name: torch.ones(site.units, dtype=torch.bool) for site in layout_of(cut).sites})
    context = RepairContext(ReconstructOptions(ridge=0.01, refit=False, target=target), int)
    repaired = walked(cut, everything, batches, closed_form_steps(context), teacher=dense)
    if target == "damped_stream":
        torch.testing.assert_close(last_hidden(repaired, batches), last_hidden(full, batches), rtol=1e-5, atol=1e-7)
        assert distance(repaired, expected, batches) > 1e-9
        return
    for (key, value), other in zip(expected.state_dict().items(), repaired.state_dict().values(), strict=True):
        torch.testing.assert_close(other, value, rtol=1e-6, atol=1e-8, msg=lambda m, key=key: f"{key}: {m}")
    assert all(report.ridge < inf for report in context.reports)
    alone = walked(cut, everything, batches, closed_form_steps(RepairContext(ReconstructOptions(ridge=0.01), int)))
    assert distance(alone, cut, batches) == 0, "without a teacher nothing has changed, so nothing is repaired"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"num_hidden_layers": 3}, r"the teacher has 3 blocks and a residual stream of width \[32\], the model 2"),
        ({"hidden_size": 48}, r"the teacher has 2 blocks and a residual stream of width \[48\], the model 2 and \[32\]"),
    ],
)
def test_a_teacher_of_another_shape_is_refused(other, message):
    model, teacher = tiny_model("bert"), tiny_model("bert", **other)
    with pytest.raises(ModelError, match=message):
        walked(model, every_other(model), tiny_batches(model), [Watch()], teacher=teacher)


def test_a_parallel_block_is_repaired(registry):
    """The residual stream of the feed-forward part is the block's input and the attention's output together."""
    model = tiny_model("gptj")
    batches, new, mask = tiny_batches(model, batches=6, sequences=16), tiny_batches(model, seed=5), every_other(model)
    cut, repaired = copy.deepcopy(model), copy.deepcopy(model)
    liar.remove(cut, mask)
    report = liar.reconstruct(repaired, mask, batches, progress=False)
    assert distance(repaired, model, new) < 0.5 * distance(cut, model, new)
    assert all(site.after < site.before for site in report.sites)


def test_what_is_kept_of_a_block_is_dropped_after_it():
    """Streams, and nothing of blocks that are done: memory does not grow with the number of blocks."""
    names = []

    class Names(Watch):
        def repair(self, site):
            super().repair(site)
            names.append((site.block.number, site.walk.store.names()))

    model = tiny_model("llama", num_hidden_layers=4)
    context = RepairContext(ReconstructOptions(), int)
    walked(model, every_other(model), tiny_batches(model, batches=1), [*closed_form_steps(context), Names()])
    for number, kept in names:
        own = [name for name in kept if name not in ("dense", "pruned")]
        calls = [name for name in own if " calls " in name]
        assert {int(name.rpartition(" ")[2]) for name in calls} == set(range(number, 4))
        assert {name.split()[0] for name in own if name not in calls} <= {f"heads.{number}", f"neurons.{number}"}


class Trained(RepairStep):
    """Changes parameters in place, as training would, and then fails or does what else a step must not do."""

    def __init__(self, then):
        self.then = then

    def repair(self, site):
        with torch.no_grad():
            for layer in (*site.producers, site.consumer):
                layer.weight.zero_()
                if layer.bias is not None:
                    layer.bias.zero_()
        self.then(site)


def failing(site):
    if site.name == "neurons.1":
        raise RuntimeError("planned")


def with_a_new_module(site):
    site.pruned_block.extra = torch.nn.Linear(2, 2)


def without_a_bias(site):
    site.consumer.module.bias = None


@pytest.mark.parametrize(
    ("then", "error", "says"),
    [
        (failing, RuntimeError, "planned"),
        (with_a_new_module, ModelError, "got others: extra; a repair step may only write new values"),
        (without_a_bias, ModelError, "got others: .*dense.bias.*a repair step may only write"),
    ],
)
def test_a_step_that_fails_leaves_the_model_as_it_was(then, error, says):
    """Weights and biases, although the step changed its copies in place."""
    model = tiny_model("bert")
    before = model_state(model)
    calibration = Calibration.of(tiny_batches(model), model)
    with pytest.raises(error, match=says):
        apply_steps(model, layout_of(model), calibration, [Trained(then)], every_other(model))
    assert_same_state(model, before)


def test_a_bias_stays_as_trainable_as_it_was():
    model = tiny_model("bert")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith("bias")
    liar.reconstruct(model, every_other(model), tiny_batches(model), progress=False)
    assert all(parameter.requires_grad == name.endswith("bias") for name, parameter in model.named_parameters())


def test_what_is_kept_for_only_one_batch_is_not_replayed():
    """A sublayer is replayed where every batch has something to replay; otherwise it runs again."""

    class KeepsOne(RepairStep):
        def repair(self, site):
            for batch, pruned in site.run_pruned("consumer_input"):
                if batch == 0:
                    site.keep_for_replay(batch, pruned["consumer_input"])

    model = tiny_model("llama")
    mask, batches = every_other(model), tiny_batches(model, batches=3)
    cut = copy.deepcopy(model)
    liar.remove(cut, mask)
    assert distance(walked(model, mask, batches, [KeepsOne()]), cut, batches) == 0


@pytest.mark.parametrize("target", TARGETS)
def test_everything_is_kept_under_another_teacher(target):
    """The stream is another one, so that sites are visited although nothing is removed."""
    model, teacher = tiny_model("bert"), tiny_model("bert", seed=1)
    context = RepairContext(ReconstructOptions(target=target), int)
    everything = liar.Mask({site.name: torch.ones(site.units, dtype=torch.bool) for site in layout_of(model).sites})
    batches = tiny_batches(model)
    result = walked(model, everything, batches, closed_form_steps(context), teacher=teacher)
    assert [report.site for report in context.reports] == [site.name for site in layout_of(model).sites]
    assert (distance(result, model, batches) == 0) == (target == "layer_output")


def test_layer_outputs_need_a_teacher_of_the_same_widths():
    model = tiny_model("bert")
    teacher = tiny_model("bert", intermediate_size=80)
    context = RepairContext(ReconstructOptions(target="layer_output"), int)
    with pytest.raises(ModelError, match=r"neurons\.0: the teacher has 80 units, the model 64.*use target='damped_stream'"):
        walked(model, every_other(model), tiny_batches(model), closed_form_steps(context), teacher=teacher)


def test_what_a_16_bit_stream_lacks_is_computed_in_more_bits():
    """Target and residual are large and alike: their difference in bfloat16 would be mostly rounding error."""
    missing = []

    class Recording(Folds):
        def update(self, z, t, tokens, weight=None):
            missing.append(tokens.gather(t).double())
            super().update(z, t, tokens, weight)

    class Exact(RepairStep):
        captures = frozenset({"stream"})

        def observe(self, site, batch, dense):
            site.put("exact target", batch, dense["stream"])

        def repair(self, site):
            for batch, pruned in site.run_pruned("residual"):
                gather = site.tokens(batch).gather
                exact = gather(site.get("exact target", batch)).double() - gather(pruned["residual"]).double()
                torch.testing.assert_close(missing.pop(0), exact, rtol=1e-6, atol=1e-6)
            assert missing == []
            site.discard("exact target")

    model = tiny_model("llama", dtype=torch.bfloat16)
    context = RepairContext(ReconstructOptions(target="residual_stream", refit=False), int)
    context.new_folds = lambda *_: Recording(FOLDS, Moments)
    walked(model, every_other(model), tiny_batches(model), [*closed_form_steps(context), Exact()])
    assert len(context.reports) == 4


def test_a_search_for_a_ridge_begins_at_that_of_the_last_site_of_its_kind(monkeypatch):
    model = tiny_model("bert", num_hidden_layers=3)
    begun, found = [], []

    def spy(wrapped, *arguments, start=None, **options):
        begun.append(start)
        solution = wrapped(*arguments, start=start, **options)
        found.append(solution.ridge)
        return solution

    for function in (fit, fit_damped):
        monkeypatch.setattr(context_module, function.__name__, partial(spy, function))
    mask = liar.select(model, keep=0.5, criterion="magnitude", progress=False)
    report = liar.reconstruct(model, mask, tiny_batches(model, batches=8, sequences=16, length=24), progress=False)
    kinds = [site.site.split(".")[0] for site in report.sites]
    last = {}
    for kind, start, ridge in zip(kinds, begun, found, strict=True):
        assert start == last.get(kind, MIDDLE)
        last[kind] = ridge
    assert len(set(last.values())) == 2, "otherwise a start from the other kind would pass"
