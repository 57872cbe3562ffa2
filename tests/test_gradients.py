"""Gradients by unit against finite differences of naive losses; the guest's flags, gradients and modes; labels."""

import copy

import numpy as np
import pytest
import torch
from cases import MODELS

import liar
from liar.batches import Calibration
from liar.criteria import CRITERIA, Units, scores
from liar.errors import CalibrationError, ModelError
from liar.families import discover
from liar.gradients import SEED, STRIDE, unit_gradients
from liar.loss import IGNORED, drawn, labelled
from liar.outputs import Output, outputs
from liar.sensitivity import sensitivities
from liar.testing import tiny_batches, tiny_model
from liar.testing.guest import assert_same_state, guest_state

NAMES = ("taylor", "fisher", "snip")
# Five points: the error is of order STEP^4, so the step may be so long that the norms of LLaMA, float32 always, do no harm.
STEP, POINTS = 0.01, {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12}
RTOL = {"bert": 1e-5, "llama": 1e-3}


def prepared(name, *, labels=False, dtype=torch.float64, batches=2, padding="right", **options):
    """A tiny model with few neurons, and batches, with labels if wanted."""
    model = tiny_model(**{**MODELS[name], "dtype": dtype, "intermediate_size": 12, **options})
    data = tiny_batches(model, batches=batches, sequences=4, length=8, padding=padding)
    return model, with_labels(model, data) if labels else data


def with_labels(model, data, seed=5):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for batch in data:
        shape = model(**batch).logits.shape
        if shape[-1] == 1:
            labels = torch.randn(shape[:-1], generator=generator, dtype=model.dtype)
        else:
            labels = torch.randint(shape[-1], shape[:-1], generator=generator)
        if labels.ndim == 2:
            # Some tokens do not count, and what stands in the padding must not.
            labels[:, 3] = IGNORED
        made.append({**batch, "labels": labels})
    return made


def found(model, batches, passes=unit_gradients):
    return passes(model, discover(model), Calibration.of(batches, model), progress=False)


def seeded(number, output=0):
    return torch.Generator().manual_seed(SEED + STRIDE * number + output)


def losses(model, batch, number, draws):
    """The loss of every sequence by itself, token by token; `draws` keeps what was drawn in the first pass of a batch."""
    said = model(**{name: value for name, value in batch.items() if name != "labels"})
    keep, labels = batch["attention_mask"].bool(), batch.get("labels")
    if "start_logits" in said:
        total = 0
        for output, logits in enumerate((said.start_logits, said.end_logits)):
            chances = logits.where(keep, -torch.inf).log_softmax(-1)
            labels = draws.setdefault((number, output), torch.multinomial(chances.exp(), 1, generator=seeded(number, output)))
            total = total - chances.gather(1, labels)[:, 0]
        return total
    if "logits" not in said:
        states = said[0]
        mean = torch.stack([row[kept].mean(0) for row, kept in zip(states, keep, strict=True)])
        if number not in draws:
            noise = torch.randn(mean.shape, generator=seeded(number), dtype=mean.dtype)
            draws[number] = noise / mean.detach().square().mean(1, keepdim=True).sqrt()
        return (mean * draws[number]).sum(1)
    logits = said.logits
    if logits.shape[-1] == 1:
        if labels is None:
            labels = draws.setdefault(number, torch.randn(logits.shape, generator=seeded(number), dtype=logits.dtype))
            return (logits * labels).sum(1)
        return (logits[:, 0] - labels).square() / 2
    chances = logits.log_softmax(-1)
    if logits.ndim == 2:
        if labels is None:
            labels = draws.setdefault(number, torch.multinomial(chances.exp(), 1, generator=seeded(number))[:, 0])
        return -torch.stack([row[label] for row, label in zip(chances, labels, strict=True)])
    shift = 0
    if labels is None:
        if number not in draws:
            draws[number] = torch.full(keep.shape, IGNORED)
            draws[number][keep] = torch.multinomial(chances[keep].exp(), 1, generator=seeded(number))[:, 0]
        labels = draws[number]
    elif "CausalLM" in type(model).__name__:
        shift = 1
    total = []
    for sequence in range(len(labels)):
        total.append(logits.new_zeros(()))
        for token in range(shift, labels.shape[1]):
            counts = keep[sequence, token] and keep[sequence, token - shift] and labels[sequence, token] != IGNORED
            if counts:
                total[-1] = total[-1] - chances[sequence, token - shift, labels[sequence, token]]
    return torch.stack(total)


def slopes(model, batches, site):
    """dL/dm of every sequence and unit, [sequences, units], by differences: the consumer's input is scaled."""
    consumer = model.get_submodule(site.module)
    width = site.consumer.width
    draws, rows = {}, []
    with torch.no_grad():
        for number, batch in enumerate(batches):
            losses(model, batch, number, draws)
            columns = []
            for unit in range(site.units):
                slope = 0
                for point, weight in POINTS.items():

                    def scale(_module, args, unit=unit, point=point):
                        x = args[0].clone()
                        x[..., unit * width : (unit + 1) * width] *= 1 + point * STEP
                        return (x, *args[1:])

                    handle = consumer.register_forward_pre_hook(scale)
                    slope = slope + weight / STEP * losses(model, batch, number, draws)
                    handle.remove()
                columns.append(slope)
            rows.append(torch.stack(columns, 1))
    return torch.cat(rows)


def close(got, want, rtol=1e-6):
    torch.testing.assert_close(got, want, rtol=rtol, atol=rtol * float(want.abs().max()))


CASES = [
    ("bert", False),
    ("bert-classifier", True),
    ("bert-classifier", False),
    ("bert-tokens", True),
    ("bert-qa", False),
    ("llama", False),
    ("llama-lm", False),
    ("llama-8q-2kv", True),
]


@pytest.mark.parametrize(("name", "labels"), CASES)
def test_scaling_a_unit_changes_the_loss_by_its_gradient(name, labels):
    model, batches = prepared(name, labels=labels)
    got = found(model, batches)
    for site in discover(model).sites:
        want = slopes(model, batches, site)
        rtol = RTOL[model.config.model_type]
        close(got[site.name]["gradient"], want.sum(0), rtol)
        close(got[site.name]["squared_gradient"], want.square().sum(0), rtol)
        assert {value.dtype for value in got[site.name].values()} == {torch.float64}
        assert {value.shape for value in got[site.name].values()} == {(site.units,)}


@pytest.mark.parametrize("labels", [True, False])
def test_a_number_has_a_squared_error(labels):
    model, batches = prepared("bert-classifier", labels=labels, num_labels=1)
    got = found(model, batches)
    for site in discover(model).sites:
        close(got[site.name]["gradient"], slopes(model, batches, site).sum(0), RTOL["bert"])


@pytest.mark.parametrize("name", ["bert-classifier", "llama-8q-2kv", "llama-biases"])
def test_weights_against_autograd_of_the_naive_loss(name):
    """|w * dL/dw| by unit; and LLM-Pruner's sum of w * dL/dw over the consumer's columns is the gradient of the unit."""
    model, batches = prepared(name, labels=True)
    got = found(model, batches)
    sum(losses(model, batch, number, {}).sum() for number, batch in enumerate(batches)).backward()
    for site in discover(model).sites:
        block = model.get_submodule(site.block)
        consumer = model.get_submodule(site.module).weight
        by_weight = (consumer * consumer.grad).detach().T.reshape(site.units, -1)
        close(got[site.name]["gradient"], by_weight.sum(1))
        want = by_weight.abs().sum(1)
        for edge in site.producers:
            for part in block.get_submodule(edge.module).parameters():
                want += (part * part.grad).detach().abs().reshape(site.units, -1).sum(1)
        close(got[site.name]["weight_gradient"], want)


@pytest.mark.parametrize("name", ["bert-classifier", "llama-lm"])
def test_the_loss_is_that_of_transformers(name):
    model, batches = prepared(name, labels=True, padding=None)
    for batch in batches:
        said = model(**batch)
        keep, labels = batch["attention_mask"].bool(), batch["labels"]
        counted = int((labels[:, 1:] != IGNORED).sum()) if labels.ndim == 2 else len(labels)
        got = labelled(outputs({"logits": said.logits}, keep), keep, labels, causal="CausalLM" in type(model).__name__)
        close(got.detach(), said.loss.detach().double() * counted)


@pytest.mark.parametrize("name", ["bert-classifier", "llama-8q-2kv"])
def test_a_batch_is_its_sequences(name):
    model, batches = prepared(name, labels=True)
    single = [
        {key: value[i : i + 1] for key, value in batch.items()} for batch in batches for i in range(len(batch["input_ids"]))
    ]
    together, apart = found(model, batches), found(model, single)
    for site, known in together.items():
        for key, value in known.items():
            close(apart[site][key], value, rtol=1e-9)


@pytest.mark.parametrize("name", ["bert-classifier", "llama-8q-2kv", "bert-tokens"])
def test_padding_has_no_say(name):
    """Neither what stands there, nor its labels, nor that there is any."""
    model, batches = prepared(name, labels=True)
    want = found(model, batches)
    other = []
    for batch in batches:
        real = batch["attention_mask"].bool()
        changed = {**batch, "input_ids": batch["input_ids"].where(real, 9)}
        if changed["labels"].ndim == 2:
            changed["labels"] = changed["labels"].where(real, 1)
        longer = {key: torch.nn.functional.pad(value, (0, 3)) if value.ndim == 2 else value for key, value in changed.items()}
        other.append(longer)
    for site, known in found(model, other).items():
        for key, value in known.items():
            close(value, want[site][key], rtol=1e-9)


def test_padding_on_the_left():
    model, right = prepared("llama-8q-2kv", labels=True)
    left = []
    for batch in right:
        shift = batch["attention_mask"].shape[1] - batch["attention_mask"].sum(1)
        rolled = lambda rows, shift=shift: torch.stack([row.roll(int(by)) for row, by in zip(rows, shift, strict=True)])  # noqa: E731
        left.append({key: rolled(value) for key, value in batch.items()})
    # Rotations are relative: a sequence that begins later is the same sequence.
    want = found(model, right)
    for site, known in found(model, left).items():
        for key, value in known.items():
            close(value, want[site][key])


def test_answers_are_not_looked_for_in_the_padding():
    model, batches = prepared("bert-qa")
    other = [{**batch, "input_ids": batch["input_ids"].where(batch["attention_mask"].bool(), 9)} for batch in batches]
    want = found(model, batches)
    for site, known in found(model, other).items():
        close(known["squared_gradient"], want[site]["squared_gradient"], rtol=1e-9)


@pytest.mark.parametrize("chances", [[0.5, 0.5], [0.7, 0.2, 0.1]])
def test_drawn_labels_give_the_fisher_information(chances):
    """By logits it is diag(p) - p p'; soft labels would give zero."""
    p = torch.tensor(chances, dtype=torch.float64)
    logits = p.log().repeat(20000, 1).requires_grad_()
    drawn([Output("logits", logits.log_softmax(-1), probable=True, by_token=False)], 0).backward()
    torch.testing.assert_close(logits.grad.T @ logits.grad / len(logits), p.diag() - torch.outer(p, p), rtol=0, atol=0.01)


def test_drawn_hidden_states_have_no_unit():
    states = torch.randn(4000, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    grown = []
    for size in (1, 100):
        rows = (size * states).requires_grad_()
        drawn([Output("hidden", rows, probable=False, by_token=False)], 0).backward()
        grown.append(size * rows.grad)
        assert float((rows.grad.square() * rows.detach().square().mean(1, keepdim=True)).mean()) == pytest.approx(1, abs=0.03)
    torch.testing.assert_close(grown[0], grown[1])


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("frozen", ["all", "some", "none"])
def test_the_guest_is_as_it_was(labels, frozen):
    """Flags, gradients, modes, hooks and the random state; and the flags do not matter."""
    model, batches = prepared("llama-8q-2kv", labels=labels)
    want = found(model, batches)
    model.train()
    model.get_submodule("model.layers.0.mlp").eval()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(frozen == "none" or (frozen == "some" and number % 2 == 0))
        parameter.grad = torch.full_like(parameter, number) if number % 3 else None
    before, gradients = guest_state(model), [copy.deepcopy(parameter.grad) for parameter in model.parameters()]
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            got = found(model, batches)
        assert_same_state(model, before)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            assert parameter.grad is None if gradient is None else torch.equal(parameter.grad, gradient)
        for site, known in got.items():
            assert not any(value.requires_grad for value in known.values())
            for key, value in known.items():
                torch.testing.assert_close(value, want[site][key], rtol=0, atol=0)


def test_the_guest_is_as_it_was_after_an_error():
    model, batches = prepared("llama-8q-2kv", labels=True)
    model.train().requires_grad_(False)
    next(model.parameters()).requires_grad_(True)
    batches[1]["labels"][0, 1] = 10_000
    before = guest_state(model)
    with pytest.raises(CalibrationError, match=r"calibration batch 1: expected labels from 0 to 96 - 1, or -100"):
        found(model, batches)
    assert_same_state(model, before)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["bert", "bert-qa", "llama-lm"])
def test_draws_repeat(name):
    model, batches = prepared(name)
    torch.manual_seed(0)
    first = found(model, batches)
    torch.manual_seed(1)
    second = found(model, batches)
    assert all(torch.equal(value, second[site][key]) for site, known in first.items() for key, value in known.items())


@pytest.mark.parametrize("criterion", NAMES)
@pytest.mark.parametrize("name", ["bert-classifier", "llama-lm"])
def test_labels_are_used_when_given(name, criterion):
    model, batches = prepared(name)
    layout = discover(model)
    made = []
    for data in (batches, with_labels(model, batches), with_labels(model, batches, seed=6)):
        known = liar.collect(model, data, criteria=[criterion], progress=False).sites
        made.append([scores(criterion, Units.of(model.get_submodule(s.block), s, known[s.name])) for s in layout.sites])
        liar.select(model, data, keep=0.6, criterion=criterion, progress=False)
    for one, other in ((0, 1), (1, 2)):
        assert not any(torch.allclose(a, b) for a, b in zip(made[one], made[other], strict=True))


def test_labels_change_nothing_else():
    model, batches = prepared("bert-classifier")
    for criterion in ("reconstruction", "fluctuation"):
        how = {"keep": 0.6, "criterion": criterion, "progress": False}
        assert liar.select(model, with_labels(model, batches), **how) == liar.select(model, batches, **how)


@pytest.mark.parametrize("criterion", NAMES)
def test_scores_are_per_parameter(criterion):
    model, batches = prepared("llama-8q-2kv", labels=True)
    got = found(model, batches)
    for site in discover(model).sites:
        known = got[site.name]
        want = {"taylor": known["gradient"].abs(), "fisher": known["squared_gradient"], "snip": known["weight_gradient"]}
        made = scores(criterion, Units.of(model.get_submodule(site.block), site, known))
        torch.testing.assert_close(made * site.parameters, want[criterion])
    assert CRITERIA[criterion].comparable


def test_a_unit_that_goes_nowhere_is_worth_nothing():
    model, batches = prepared("bert-classifier", labels=True)
    second = model.bert.encoder.layer[0].output.dense
    second.weight.data[:, 5] = 0
    known = found(model, batches)["neurons.0"]
    assert float(known["gradient"][5]) == float(known["squared_gradient"][5]) == float(known["weight_gradient"][5]) == 0
    assert int((known["squared_gradient"] == 0).sum()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_float_types(dtype):
    model, batches = prepared("llama-8q-2kv", labels=True)
    want = found(model, batches)
    got = found(model.to(dtype), batches)
    for site, known in got.items():
        for key, value in known.items():
            assert value.dtype == torch.float64
            error = float((value - want[site][key]).norm() / want[site][key].norm())
            assert error < {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]


def test_a_model_that_says_nothing_has_no_gradients():
    model, batches = prepared("llama")
    model.norm.weight.data.zero_()
    for known in found(model, batches).values():
        assert all(float(value.abs().max()) == 0 for value in known.values())


def test_a_batch_of_padding_adds_nothing():
    for name in ("llama-lm", "bert"):
        model, batches = prepared(name)
        nothing = {key: torch.zeros_like(value) for key, value in batches[0].items()}
        want = found(model, batches)
        for site, known in found(model, [*batches, nothing]).items():
            assert all(np.isfinite(value.numpy()).all() for value in known.values())
            close(known["gradient"], want[site]["gradient"])


BAD = {
    "some": (lambda batch: {k: v for k, v in batch.items() if k != "labels"}, "batch 1: expected labels, .* got none"),
    "list": (lambda batch: {**batch, "labels": [1, 0]}, "batch 1: expected labels as a tensor, got a list"),
    "shape": (
        lambda batch: {**batch, "labels": batch["labels"][:, :-1]},
        r"batch 1: expected integer labels of shape \[4, 8\] for logits of shape \[\d+, 96\], got .* of shape \[4, 7\]",
    ),
    "floats": (lambda batch: {**batch, "labels": batch["labels"].float()}, "expected integer labels .* got torch.float32"),
    "range": (lambda batch: {**batch, "labels": batch["labels"] - 50}, "from 0 to 96 - 1, or -100 .* got labels from -150 to"),
}


@pytest.mark.parametrize("bad", BAD)
def test_labels_that_do_not_fit(bad):
    model, batches = prepared("llama-lm", labels=True)
    change, message = BAD[bad]
    with pytest.raises(CalibrationError, match=message):
        liar.select(model, [batches[0], change(batches[1])], keep=0.5, criterion="fisher", progress=False)


def test_labels_without_a_head():
    model, batches = prepared("bert")
    labels = [{**batch, "labels": torch.zeros(4, dtype=torch.int64)} for batch in batches]
    with pytest.raises(CalibrationError, match="BertModel has no head to compare them with: give the model with its head"):
        found(model, labels)
    model, batches = prepared("bert-qa")
    with pytest.raises(CalibrationError, match="compared with `logits`, the model gives start_logits and end_logits: leave"):
        found(model, [{**batch, "labels": torch.zeros(4, dtype=torch.int64)} for batch in batches])


@pytest.mark.parametrize("passes", [unit_gradients, sensitivities])
def test_damage_is_named(passes):
    model, batches = prepared("bert-classifier")
    model.bert.encoder.layer[1].intermediate.dense.weight.data[3, 3] = float("nan")
    before = guest_state(model)
    with pytest.raises(CalibrationError, match=r"neurons\.1 \(bert\.encoder\.layer\.1\.output\.dense\): NaN or Inf in the act"):
        found(model, batches, passes)
    assert_same_state(model, before)
    model, batches = prepared("bert-classifier")
    model.classifier.weight.data[0, 0] = float("inf")
    with pytest.raises(CalibrationError, match=r"output \(BertForSequenceClassification\): NaN or Inf"):
        found(model, batches, passes)


@pytest.mark.parametrize("passes", [unit_gradients, sensitivities])
def test_gradients_that_overflow_are_named(passes):
    """It begins after the last site, and spreads to all that stand before it."""
    model, batches = prepared("bert-classifier")
    handle = model.bert.encoder.layer[1].output.register_forward_hook(lambda _module, _args, y: Overflow.apply(y))
    with pytest.raises(CalibrationError, match=r"neurons\.1 \(bert\.encoder\.layer\.1\.output\.dense\): NaN .* the gradients"):
        found(model, batches, passes)
    handle.remove()


class Overflow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, slope):
        return slope * float("inf")


@pytest.mark.parametrize("passes", [unit_gradients, sensitivities])
def test_parameters_made_in_inference_mode(passes):
    with torch.inference_mode():
        model = tiny_model("bert", head="sequence-classification")
    with pytest.raises(ModelError, match=r"made inside torch\.inference_mode: load the model outside of it"):
        found(model, tiny_batches(model), passes)


@pytest.mark.parametrize("passes", [unit_gradients, sensitivities])
def test_batches_the_head_does_not_take(passes):
    model, batches = prepared("llama-classifier")
    model.config.pad_token_id = None
    with pytest.raises(CalibrationError, match="LlamaForSequenceClassification does not take calibration batch 0"):
        found(model, batches, passes)
