"""Gradients by unit against finite differences of naive losses; the user's flags, gradients and modes; labels."""

import copy

import numpy as np
import pytest
import reference
import torch
from cases import MODELS, quiet

import liar
from liar.data import Calibration
from liar.errors import CalibrationError, ModelError
from liar.models import layout_of
from liar.runtime import Output, model_outputs
from liar.selection import CRITERIA, SiteWeights, scores
from liar.selection.fisher import sensitivities
from liar.selection.gradients import unit_gradients
from liar.selection.loss import IGNORED, MANY_CLASSES, STRIDE, _sampled_class, label_loss, sampled_label_loss
from liar.testing import assert_same_state, model_state, tiny_batches, tiny_model

NAMES = ("taylor", "fisher", "snip")
# Five points: the error is of order STEP^4, so the step may be so long that the norms of LLaMA, float32 always, do no harm.
STEP, POINTS = 0.01, {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12}
RTOL = {"bert": 1e-5, "llama": 1e-3, "gpt2": 1e-5}


def prepared(name, *, labels=False, dtype=torch.float64, batches=2, padding="right", **options):
    """A tiny model with few neurons, and batches, with labels if requested."""
    arguments = {**MODELS[name], "dtype": dtype}
    model = tiny_model(**{**arguments, reference.NEURONS[arguments["model_type"]]: 12, **options})
    data = tiny_batches(model, batches=batches, sequences=4, length=8, padding=padding)
    return model, with_labels(model, data) if labels else data


def with_labels(model, data, seed=5):
    generator = torch.Generator().manual_seed(seed)
    built = []
    for batch in data:
        shape = model(**batch).logits.shape
        if shape[-1] == 1:
            labels = torch.randn(shape[:-1], generator=generator, dtype=model.dtype)
        else:
            labels = torch.randint(shape[-1], shape[:-1], generator=generator)
        if labels.ndim == 2:
            # Some tokens do not count, and what stands in the padding must not.
            labels[:, 3] = IGNORED
        built.append({**batch, "labels": labels})
    return built


def sums(model, batches, passes=unit_gradients):
    return passes(model, layout_of(model), Calibration.of(batches, model), progress=quiet())


def sampled(samples, first, output, sequences, draw):
    """What `draw(sequence, generator)` gives for each of a batch's sequences, the same ones in every pass.

    Every sequence has a generator of its own, seeded by its number in the whole data.
    """
    key = (first, output)
    if key not in samples:
        generators = [torch.Generator().manual_seed(STRIDE * (first + sequence) + output) for sequence in range(sequences)]
        samples[key] = [draw(sequence, generator).detach() for sequence, generator in enumerate(generators)]
    return samples[key]


def choice(log_probabilities, generator):
    """A class for every row [rows, classes]."""
    return torch.multinomial(log_probabilities.exp(), 1, generator=generator)[:, 0]


def losses(model, batch, first, samples):
    """The loss of every sequence by itself, token by token.

    `first` is the number of the first sequence, and `samples` keeps the labels that were sampled in the first pass.
    """
    returned = model(**{name: value for name, value in batch.items() if name != "labels"})
    real, labels = batch["attention_mask"].bool(), batch.get("labels")
    count = len(real)
    if "start_logits" in returned:
        total = 0
        for output, logits in enumerate((returned.start_logits, returned.end_logits)):
            rows = logits.where(real, -torch.inf).log_softmax(-1)
            positions = sampled(
                samples, first, output, count, lambda i, generator, rows=rows: choice(rows[i : i + 1], generator)
            )
            total = total - rows.gather(1, torch.stack(positions))[:, 0]
        return total
    if "logits" not in returned:
        mean = torch.stack([row[kept].mean(0) for row, kept in zip(returned[0], real, strict=True)])

        def relative_noise(i, generator):
            noise = torch.randn((1, mean.shape[1]), generator=generator, dtype=mean.dtype)[0]
            return noise / mean[i].square().mean().sqrt()

        return (mean * torch.stack(sampled(samples, first, 0, count, relative_noise))).sum(1)
    logits = returned.logits
    if logits.shape[-1] == 1:
        if labels is None:
            noise = sampled(samples, first, 0, count, lambda _, g: torch.randn((1, 1), generator=g, dtype=logits.dtype)[0])
            return (logits * torch.stack(noise)).sum(1)
        return (logits[:, 0] - labels).square() / 2
    rows = logits.log_softmax(-1)
    if logits.ndim == 2:
        if labels is None:
            labels = sampled(samples, first, 0, count, lambda i, generator: choice(rows[i : i + 1], generator)[0])
        return -torch.stack([row[label] for row, label in zip(rows, labels, strict=True)])
    shift = 0
    if labels is None:

        def tokens(i, generator):
            row = torch.full(real[i].shape, IGNORED)
            row[real[i]] = choice(rows[i, real[i]], generator)
            return row

        labels = torch.stack(sampled(samples, first, 0, count, tokens))
    elif type(model).__name__.endswith(("CausalLM", "LMHeadModel")):
        shift = 1
    total = []
    for sequence in range(count):
        total.append(logits.new_zeros(()))
        for token in range(shift, labels.shape[1]):
            counts = real[sequence, token] and real[sequence, token - shift] and labels[sequence, token] != IGNORED
            if counts:
                total[-1] = total[-1] - rows[sequence, token - shift, labels[sequence, token]]
    return torch.stack(total)


def derivatives(model, batches, site):
    """dL/dm of every sequence and unit, [sequences, units], by differences: the consumer's input is scaled."""
    consumer = model.get_submodule(site.module)
    width = site.consumer.width
    samples, rows, first = {}, [], 0
    with torch.no_grad():
        for batch in batches:
            losses(model, batch, first, samples)
            columns = []
            for unit in range(site.units):
                derivative = 0
                for point, weight in POINTS.items():

                    def scale(_module, args, unit=unit, point=point):
                        x = args[0].clone()
                        x[..., unit * width : (unit + 1) * width] *= 1 + point * STEP
                        return (x, *args[1:])

                    handle = consumer.register_forward_pre_hook(scale)
                    derivative = derivative + weight / STEP * losses(model, batch, first, samples)
                    handle.remove()
                columns.append(derivative)
            rows.append(torch.stack(columns, 1))
            first += len(batch["input_ids"])
    return torch.cat(rows)


def close(result, expected, rtol=1e-6):
    torch.testing.assert_close(result, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


CASES = [
    ("bert", False),
    ("bert-classifier", True),
    ("bert-classifier", False),
    ("bert-tokens", True),
    ("bert-qa", False),
    ("llama", False),
    ("llama-lm", False),
    ("llama-8q-2kv", True),
    ("gpt2-lm", True),
    ("gpt2-lm", False),
]


@pytest.mark.parametrize(("name", "labels"), CASES)
def test_scaling_a_unit_changes_the_loss_by_its_gradient(name, labels):
    model, batches = prepared(name, labels=labels)
    result = sums(model, batches)
    for site in layout_of(model).sites:
        expected = derivatives(model, batches, site)
        rtol = RTOL[model.config.model_type]
        close(result[site.name]["gradient"], expected.sum(0), rtol)
        close(result[site.name]["squared_gradient"], expected.square().sum(0), rtol)
        assert {value.dtype for value in result[site.name].values()} == {torch.float64}
        assert {value.shape for value in result[site.name].values()} == {(site.units,)}


@pytest.mark.parametrize("labels", [True, False])
def test_a_number_has_a_squared_error(labels):
    model, batches = prepared("bert-classifier", labels=labels, num_labels=1)
    result = sums(model, batches)
    for site in layout_of(model).sites:
        close(result[site.name]["gradient"], derivatives(model, batches, site).sum(0), RTOL["bert"])


def product(layer, parameter):
    """A weight [in, out] or bias [out] of a layer times its gradient."""
    value = getattr(layer, parameter)
    result = (value * value.grad).detach()
    return result if value.ndim == 1 or hasattr(layer, "nx") else result.T


@pytest.mark.parametrize("name", ["bert-classifier", "llama-8q-2kv", "llama-biases", "gpt2-lm"])
def test_weights_against_autograd_of_the_naive_loss(name):
    """|w * dL/dw| by unit; and LLM-Pruner's sum of w * dL/dw over the consumer's columns is the gradient of the unit."""
    model, batches = prepared(name, labels=True)
    result = sums(model, batches)
    sum(losses(model, batch, 0, {}).sum() for batch in batches).backward()
    for site in layout_of(model).sites:
        block = model.get_submodule(site.block)
        by_weight = product(model.get_submodule(site.module), "weight").reshape(site.units, -1)
        close(result[site.name]["gradient"], by_weight.sum(1))
        expected = by_weight.abs().sum(1)
        for name in reference.PRODUCERS[model.config.model_type][site.kind]:
            layer = block.get_submodule(name)
            for parameter, _ in layer.named_parameters():
                by_channel = product(layer, parameter).abs().reshape(-1, reference.matrix(layer).shape[1]).sum(0)
                own = [reference.kept_outputs(layer, np.arange(site.units) == unit) for unit in range(site.units)]
                expected += torch.stack([by_channel[channels].sum() for channels in own])
        close(result[site.name]["weight_gradient"], expected)


@pytest.mark.parametrize("name", ["bert-classifier", "llama-lm", "gpt2-lm"])
def test_the_loss_is_that_of_transformers(name):
    model, batches = prepared(name, labels=True, padding=None)
    for batch in batches:
        returned = model(**batch)
        real, labels = batch["attention_mask"].bool(), batch["labels"]
        counted = int((labels[:, 1:] != IGNORED).sum()) if labels.ndim == 2 else len(labels)
        result = label_loss(model_outputs({"logits": returned.logits}, real), real, labels, causal=name != "bert-classifier")
        close(result.detach(), returned.loss.detach().double() * counted)


@pytest.mark.parametrize("name", ["bert-classifier", "llama-8q-2kv"])
def test_a_batch_is_its_sequences(name):
    model, batches = prepared(name, labels=True)
    single = [
        {key: value[i : i + 1] for key, value in batch.items()} for batch in batches for i in range(len(batch["input_ids"]))
    ]
    together, apart = sums(model, batches), sums(model, single)
    for site, of_site in together.items():
        for key, value in of_site.items():
            close(apart[site][key], value, rtol=1e-9)


@pytest.mark.parametrize("name", ["bert-classifier", "llama-8q-2kv", "bert-tokens"])
def test_padding_does_not_matter(name):
    """Neither what stands there, nor its labels, nor that there is any."""
    model, batches = prepared(name, labels=True)
    expected = sums(model, batches)
    other = []
    for batch in batches:
        real = batch["attention_mask"].bool()
        changed = {**batch, "input_ids": batch["input_ids"].where(real, 9)}
        if changed["labels"].ndim == 2:
            changed["labels"] = changed["labels"].where(real, 1)
        longer = {key: torch.nn.functional.pad(value, (0, 3)) if value.ndim == 2 else value for key, value in changed.items()}
        other.append(longer)
    for site, of_site in sums(model, other).items():
        for key, value in of_site.items():
            close(value, expected[site][key], rtol=1e-9)


def test_padding_on_the_left():
    model, right = prepared("llama-8q-2kv", labels=True)
    left = []
    for batch in right:
        shift = batch["attention_mask"].shape[1] - batch["attention_mask"].sum(1)
        rolled = lambda rows, shift=shift: torch.stack([row.roll(int(by)) for row, by in zip(rows, shift, strict=True)])  # noqa: E731
        left.append({key: rolled(value) for key, value in batch.items()})
    # Rotations are relative: a sequence that begins later is the same sequence.
    expected = sums(model, right)
    for site, of_site in sums(model, left).items():
        for key, value in of_site.items():
            close(value, expected[site][key])


def test_answers_are_not_looked_for_in_the_padding():
    model, batches = prepared("bert-qa")
    other = [{**batch, "input_ids": batch["input_ids"].where(batch["attention_mask"].bool(), 9)} for batch in batches]
    expected = sums(model, batches)
    for site, of_site in sums(model, other).items():
        close(of_site["squared_gradient"], expected[site]["squared_gradient"], rtol=1e-9)


@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("probabilities", [[0.5, 0.5], [0.7, 0.2, 0.1]])
def test_sampled_labels_give_the_fisher_information(probabilities, by_token):
    """By logits it is diag(p) - p p'; soft labels would give zero. Of many sequences, or of many tokens of one sequence."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    logits = p.log().repeat(10000, 1).requires_grad_()
    token_mask = torch.ones((1, 10000) if by_token else (10000, 1), dtype=torch.bool)
    output = Output("logits", logits.log_softmax(-1), kind="classes", by_token=by_token)
    sampled_label_loss([output], token_mask, 0).backward()
    torch.testing.assert_close(logits.grad.T @ logits.grad / len(logits), p.diag() - torch.outer(p, p), rtol=0, atol=0.015)


def test_noise_of_hidden_states_is_relative_to_their_size():
    states = torch.randn(4000, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gradients = []
    for size in (1, 100):
        rows = (size * states).requires_grad_()
        output = Output("hidden", rows, kind="numbers", by_token=False)
        sampled_label_loss([output], torch.ones(4000, 1, dtype=torch.bool), 0).backward()
        gradients.append(size * rows.grad)
        assert float((rows.grad.square() * rows.detach().square().mean(1, keepdim=True)).mean()) == pytest.approx(1, abs=0.03)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("frozen", ["all", "some", "none"])
def test_the_users_model_is_as_it_was(labels, frozen):
    """Flags, gradients, modes, hooks and the random state; and the flags do not matter."""
    model, batches = prepared("llama-8q-2kv", labels=labels)
    expected = sums(model, batches)
    model.train()
    model.get_submodule("model.layers.0.mlp").eval()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(frozen == "none" or (frozen == "some" and number % 2 == 0))
        parameter.grad = torch.full_like(parameter, number) if number % 3 else None
    before, gradients = model_state(model), [copy.deepcopy(parameter.grad) for parameter in model.parameters()]
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            result = sums(model, batches)
        assert_same_state(model, before)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            assert (parameter.grad is None) == (gradient is None)
            torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=0)
        for site, of_site in result.items():
            assert not any(value.requires_grad for value in of_site.values())
            for key, value in of_site.items():
                torch.testing.assert_close(value, expected[site][key], rtol=0, atol=0)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_sensitivities_without_gradients_around_them(context):
    model, batches = prepared("llama-8q-2kv")
    expected = sums(model, batches, sensitivities)
    with context():
        result = sums(model, batches, sensitivities)
    for site, sensitivity in expected.items():
        assert torch.equal(result[site].fisher, sensitivity.fisher)
        assert (result[site].coherence, result[site].outputs) == (sensitivity.coherence, sensitivity.outputs)


def test_the_users_model_is_as_it_was_after_an_error():
    model, batches = prepared("llama-8q-2kv", labels=True)
    model.train().requires_grad_(False)
    next(model.parameters()).requires_grad_(True)
    batches[1]["labels"][0, 1] = 10_000
    before = model_state(model)
    with pytest.raises(CalibrationError, match=r"calibration batch 1: expected labels from 0 to 96 - 1, or -100"):
        sums(model, batches)
    assert_same_state(model, before)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["bert", "bert-qa", "llama-lm"])
def test_samples_repeat(name):
    model, batches = prepared(name)
    torch.manual_seed(0)
    first = sums(model, batches)
    torch.manual_seed(1)
    second = sums(model, batches)
    assert all(torch.equal(value, second[site][key]) for site, of_site in first.items() for key, value in of_site.items())


@pytest.mark.parametrize("criterion", NAMES)
@pytest.mark.parametrize("name", ["bert-classifier", "llama-lm"])
def test_labels_are_used_when_given(name, criterion):
    model, batches = prepared(name)
    layout = layout_of(model)
    built = []
    for data in (batches, with_labels(model, batches), with_labels(model, batches, seed=6)):
        of_site = liar.collect(model, data, criteria=[criterion], progress=False).sites
        built.append(
            [scores(criterion, SiteWeights.of(model.get_submodule(s.block), s, of_site[s.name])) for s in layout.sites]
        )
        liar.select(model, data, keep=0.6, criterion=criterion, progress=False)
    for one, other in ((0, 1), (1, 2)):
        assert not any(torch.allclose(a, b) for a, b in zip(built[one], built[other], strict=True))


def test_labels_change_nothing_else():
    model, batches = prepared("bert-classifier")
    for criterion in ("reconstruction", "fluctuation"):
        how = {"keep": 0.6, "criterion": criterion, "progress": False}
        assert liar.select(model, with_labels(model, batches), **how) == liar.select(model, batches, **how)


@pytest.mark.parametrize("criterion", NAMES)
def test_scores_are_per_parameter(criterion):
    model, batches = prepared("llama-8q-2kv", labels=True)
    result = sums(model, batches)
    for site in layout_of(model).sites:
        of_site = result[site.name]
        expected = {
            "taylor": of_site["gradient"].abs(),
            "fisher": of_site["squared_gradient"],
            "snip": of_site["weight_gradient"],
        }
        built = scores(criterion, SiteWeights.of(model.get_submodule(site.block), site, of_site))
        torch.testing.assert_close(built * site.parameters, expected[criterion])
    assert CRITERIA[criterion].comparable


def test_a_unit_that_nothing_reads_scores_zero():
    model, batches = prepared("bert-classifier", labels=True)
    second = model.bert.encoder.layer[0].output.dense
    second.weight.data[:, 5] = 0
    of_site = sums(model, batches)["neurons.0"]
    assert float(of_site["gradient"][5]) == float(of_site["squared_gradient"][5]) == float(of_site["weight_gradient"][5]) == 0
    assert int((of_site["squared_gradient"] == 0).sum()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_float_types(dtype):
    model, batches = prepared("llama-8q-2kv", labels=True)
    expected = sums(model, batches)
    result = sums(model.to(dtype), batches)
    for site, of_site in result.items():
        for key, value in of_site.items():
            assert value.dtype == torch.float64
            error = float((value - expected[site][key]).norm() / expected[site][key].norm())
            assert error < {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]


def test_a_model_with_a_constant_output_has_no_gradients():
    model, batches = prepared("llama")
    model.norm.weight.data.zero_()
    for of_site in sums(model, batches).values():
        assert all(float(value.abs().max()) == 0 for value in of_site.values())


def test_a_batch_of_padding_adds_nothing():
    for name in ("llama-lm", "bert"):
        model, batches = prepared(name)
        nothing = {key: torch.zeros_like(value) for key, value in batches[0].items()}
        expected = sums(model, batches)
        for site, of_site in sums(model, [*batches, nothing]).items():
            assert all(np.isfinite(value.numpy()).all() for value in of_site.values())
            close(of_site["gradient"], expected[site]["gradient"])


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
        sums(model, labels)
    model, batches = prepared("bert-qa")
    with pytest.raises(CalibrationError, match="compared with `logits`, the model gives start_logits and end_logits: leave"):
        sums(model, [{**batch, "labels": torch.zeros(4, dtype=torch.int64)} for batch in batches])


@pytest.mark.parametrize("passes", [unit_gradients, sensitivities])
def test_damage_is_named(passes):
    model, batches = prepared("bert-classifier")
    model.bert.encoder.layer[1].intermediate.dense.weight.data[3, 3] = float("nan")
    before = model_state(model)
    with pytest.raises(CalibrationError, match=r"neurons\.1 \(bert\.encoder\.layer\.1\.output\.dense\): NaN or Inf in the act"):
        sums(model, batches, passes)
    assert_same_state(model, before)
    model, batches = prepared("bert-classifier")
    model.classifier.weight.data[0, 0] = float("inf")
    with pytest.raises(CalibrationError, match=r"output \(BertForSequenceClassification\): NaN or Inf"):
        sums(model, batches, passes)


@pytest.mark.parametrize("passes", [unit_gradients, sensitivities])
def test_gradients_that_overflow_are_named(passes):
    """It begins after the last site, and spreads to all that stand before it."""
    model, batches = prepared("bert-classifier")
    handle = model.bert.encoder.layer[1].output.register_forward_hook(lambda _module, _args, y: Overflow.apply(y))
    with pytest.raises(CalibrationError, match=r"neurons\.1 \(bert\.encoder\.layer\.1\.output\.dense\): NaN .* the gradients"):
        sums(model, batches, passes)
    handle.remove()


class Overflow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, derivative):
        return derivative * float("inf")


@pytest.mark.parametrize("passes", [unit_gradients, sensitivities])
def test_parameters_made_in_inference_mode(passes):
    with torch.inference_mode():
        model = tiny_model("bert", head="sequence-classification")
    with pytest.raises(ModelError, match=r"made inside torch\.inference_mode: load the model outside of it"):
        sums(model, tiny_batches(model), passes)


@pytest.mark.parametrize("passes", [unit_gradients, sensitivities])
def test_batches_the_head_does_not_take(passes):
    model, batches = prepared("llama-classifier")
    model.config.pad_token_id = None
    with pytest.raises(CalibrationError, match="LlamaForSequenceClassification does not take calibration batch 0"):
        sums(model, batches, passes)


def test_of_many_classes_labels_are_sampled_as_often_as_they_are_likely():
    """By inverting the distribution function; a class that cannot be is never drawn, nor one beyond the last."""
    classes = MANY_CLASSES + 10
    chances = torch.zeros(classes)
    chances[[0, 7, classes - 1]] = torch.tensor([0.2, 0.5, 0.3])
    rows = chances.log().clamp_min(-1e4).expand(2_000, -1)
    drawn = _sampled_class(rows, torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn, minlength=classes) / len(drawn)
    assert set(drawn.tolist()) == {0, 7, classes - 1}
    torch.testing.assert_close(counts[[0, 7, classes - 1]], chances[[0, 7, classes - 1]], atol=0.03, rtol=0)
    assert torch.equal(drawn, _sampled_class(rows, torch.Generator().manual_seed(0)))
