"""Repair against a teacher: a model that another tool has cut, pruning in steps, and teachers that do not fit."""

import copy
from importlib import import_module

import pytest
import torch
import transformers

import liar
from liar.errors import LiarError, MaskError, ModelError, OptionError
from liar.mask import compose, keep_all
from liar.models import layout_of
from liar.surgery import copy_dense
from liar.testing import assert_same_state, model_state, tiny_batches, tiny_model
from liar.verdicts import Verdict

NAMES = {"bert": {"model_type": "bert"}, "llama": {"model_type": "llama", "head": "causal-lm"}, "gpt2": {"model_type": "gpt2"}}


def every_other(model):
    return liar.Mask({site.name: torch.arange(site.units) % 2 == 0 for site in layout_of(model).sites})


def sliced(model, mask):
    """The model as another tool leaves it: removed weights are gone."""
    model = copy.deepcopy(model)
    liar.remove(model, mask)
    return model


def last_hidden(model, batches):
    with torch.no_grad():
        return torch.cat([model.base_model(**batch)[0][batch["attention_mask"].bool()] for batch in batches])


def distance(model, other, batches):
    return float((last_hidden(model, batches) - last_hidden(other, batches)).square().mean())


@pytest.mark.parametrize("name", NAMES)
def test_a_model_cut_elsewhere_is_repaired_as_with_its_mask(name):
    """Where the removed weights are gone, the teacher's activations say the same: within 2 %."""
    dense = tiny_model(**NAMES[name], dtype=torch.float64)
    batches, new, mask = tiny_batches(dense, batches=6, sequences=16), tiny_batches(dense, seed=5), every_other(dense)
    slim, known = sliced(dense, mask), copy.deepcopy(dense)
    liar.reconstruct(known, mask, batches, progress=False)
    report = liar.reconstruct(slim, None, batches, teacher=dense, progress=False)
    assert distance(slim, dense, new) == pytest.approx(distance(known, dense, new), rel=0.02)
    assert distance(slim, dense, new) < 0.8 * distance(sliced(dense, mask), dense, new)
    assert report.achieved == pytest.approx(layout_of(slim).parameters / layout_of(dense).parameters)
    assert Verdict.UNTOUCHED not in report.verdicts.values()


def test_a_real_model_cut_elsewhere(stories_folder):
    """A LLaMA that was trained: the same, on random tokens (real texts, and a BERT: benchmarks/steps.py)."""
    dense = transformers.AutoModelForCausalLM.from_pretrained(stories_folder).eval()
    batches, new = (tiny_batches(dense, batches=8, sequences=8, length=32, seed=seed) for seed in (0, 5))
    mask = every_other(dense)
    slim, known = sliced(dense, mask), copy.deepcopy(dense)
    liar.reconstruct(known, mask, batches, progress=False)
    liar.reconstruct(slim, None, batches, teacher=dense, progress=False)
    assert distance(slim, dense, new) == pytest.approx(distance(known, dense, new), rel=0.02)


def test_a_mask_and_a_teacher():
    """A slim model is cut further, and still fitted to the dense one: better than fitted to itself."""
    dense = tiny_model("llama", dtype=torch.float64)
    batches, new = tiny_batches(dense, batches=6, sequences=16), tiny_batches(dense, seed=5)
    first = every_other(dense)
    students = [sliced(dense, first), sliced(dense, first)]
    second = liar.Mask({site.name: torch.arange(site.units) > 0 if site.kind == "neurons" else torch.ones(site.units).bool()
                        for site in layout_of(students[0]).sites})  # fmt: skip
    liar.reconstruct(students[0], second, batches, teacher=dense, progress=False)
    liar.reconstruct(students[1], second, batches, progress=False)
    assert distance(students[0], dense, new) < distance(students[1], dense, new)
    assert layout_of(students[0])["neurons.0"].units == int(second["neurons.0"].sum())


def test_the_teacher_is_left_alone():
    dense, batches = tiny_model("bert"), tiny_batches(tiny_model("bert"))
    slim, state = sliced(dense, every_other(dense)), model_state(dense)
    liar.reconstruct(slim, None, batches, teacher=dense, progress=False)
    assert_same_state(dense, state)


def other(**config):
    return tiny_model("bert", **config)


MISFITS = {
    "width": (lambda model: other(hidden_size=48), "a residual stream of width"),
    "blocks": (lambda model: other(num_hidden_layers=3), "the teacher has 3 blocks .*, the model 2"),
    "vocabulary": (lambda model: other(vocab_size=128), "a vocabulary of 128 tokens, the model of 96"),
    "itself": (lambda model: model, "expected another model, got the model itself"),
}


VERBS = {
    "reconstruct": lambda model, teacher, data: liar.reconstruct(model, None, data, teacher=teacher, progress=False),
    "refine": lambda model, teacher, data: liar.refine(model, teacher, data, progress=False),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", MISFITS)
def test_teachers_that_do_not_fit(name, verb):
    made, message = MISFITS[name]
    model = tiny_model("bert")
    teacher, batches, state = made(model), tiny_batches(model), model_state(model)
    call = VERBS[verb]
    with pytest.raises(ModelError, match=message):
        call(model, teacher, batches)
    assert_same_state(model, state)


def test_options_that_need_one_or_forbid_it():
    dense = tiny_model("bert")
    slim, batches = sliced(dense, every_other(dense)), tiny_batches(dense)
    state = model_state(slim)
    with pytest.raises(MaskError, match=r"mask=None cuts nothing.*teacher="):
        liar.reconstruct(slim, None, batches, progress=False)
    with pytest.raises(OptionError, match="takes no teacher: use target='damped_stream'"):
        liar.reconstruct(slim, None, batches, teacher=dense, target="layer_output", progress=False)
    assert_same_state(slim, state)


@pytest.mark.parametrize("budget", ["params", "flops"])
@pytest.mark.parametrize("name", NAMES)
def test_steps_end_at_the_budget(name, budget):
    model = tiny_model(**NAMES[name])
    dense, batches = copy.deepcopy(model), tiny_batches(model, batches=6)
    report = liar.prune(model, batches, keep=0.4, steps=2, budget=budget, progress=False)
    assert report.options["steps"] == 2
    assert report.achieved == pytest.approx(layout_of(model).parameters / layout_of(dense).parameters)
    assert [site.total for site in report.sites] == [site.units for site in layout_of(dense).sites]
    assert [site.kept for site in report.sites] == [site.units for site in layout_of(model).sites]
    assert report.requested == (0.4 if budget == "params" else None)
    share = report.achieved if budget == "params" else liar.flops(model).dense / liar.flops(dense).dense
    assert 0.3 < share <= 0.4


def test_one_step_is_what_it_was():
    models = [tiny_model("llama") for _ in range(2)]
    batches = tiny_batches(models[0], batches=6)
    reports = [liar.prune(models[0], batches, keep=0.5, progress=False)]
    reports.append(liar.prune(models[1], batches, keep=0.5, steps=1, progress=False))
    assert "steps" not in reports[1].options
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, two)


def test_later_steps_are_fitted_to_the_dense_model(monkeypatch):
    """Not to the model that the step before left: its teacher has all units, and the values of before the first step."""
    module = import_module("liar.api.prune")
    model, seen = tiny_model("bert"), []
    dense, batches = copy.deepcopy(model), tiny_batches(model, batches=6)
    real = module.repair

    def noted(*args, teacher=None):
        seen.append(None if teacher is None else copy.deepcopy(teacher))
        return real(*args, teacher=teacher)

    monkeypatch.setattr(module, "repair", noted)
    liar.prune(model, batches, keep=0.3, steps=3, progress=False)
    assert [each is None for each in seen] == [True, False, False]
    for teacher in seen[1:]:
        torch.testing.assert_close(last_hidden(teacher, batches), last_hidden(dense, batches), rtol=0, atol=0)


def test_steps_that_cannot_be():
    model, batches = tiny_model("bert"), tiny_batches(tiny_model("bert"))
    state = model_state(model)
    with pytest.raises(OptionError, match="steps=2 needs a budget that is computed anew"):
        liar.prune(model, batches, keep=0.5, steps=2, budget=liar.flops(model), progress=False)
    with pytest.raises(OptionError, match="needs target='damped_stream'"):
        liar.prune(model, batches, keep=0.5, steps=2, target="layer_output", progress=False)
    with pytest.raises(OptionError, match="steps=0: expected a whole number"):
        liar.prune(model, batches, keep=0.5, steps=0, progress=False)
    assert_same_state(model, state)


def test_an_error_in_the_second_step_undoes_the_first(monkeypatch):
    module = import_module("liar.api.prune")
    model, calls, real = tiny_model("bert"), [], module.choose
    batches, state = tiny_batches(model, batches=6), model_state(model)

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise LiarError("in the second step")
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "choose", failing)
    with pytest.raises(LiarError, match="in the second step"):
        liar.prune(model, batches, keep=0.4, steps=2, progress=False)
    assert_same_state(model, state)


def test_two_cuts_as_one():
    dense = tiny_model("llama")
    first = every_other(dense)
    slim = sliced(dense, first)
    second = every_other(slim)
    twice, once = sliced(slim, second), sliced(dense, compose(first, second))
    for one, two in zip(twice.parameters(), once.parameters(), strict=True):
        assert torch.equal(one, two)
    assert compose(first, keep_all(layout_of(slim))) == first
    heads = liar.Mask({"heads.0": torch.tensor([True, False, True, True])})
    groups = liar.Mask({"heads.0": torch.tensor([True, True])})
    assert compose(groups, heads)["heads.0"].tolist() == heads["heads.0"].tolist()
    assert compose(liar.Mask({"heads.0": torch.ones(4).bool()}), liar.Mask({"heads.0": torch.tensor([True, False])}))[
        "heads.0"
    ].tolist() == [True, True, False, False]


def test_the_dense_copy_stays_as_it_is():
    model = tiny_model("llama")
    batches, dense = tiny_batches(model), copy_dense(model)
    before = last_hidden(dense, batches)
    liar.remove(model, every_other(model))
    assert torch.equal(last_hidden(dense, batches), before)
    assert dense.config.intermediate_size == 64


@pytest.mark.parametrize(
    "fit",
    [
        lambda model, teacher, batches: liar.reconstruct(model, every_other(model), batches, teacher=teacher, progress=False),
        lambda model, teacher, batches: liar.refine(model, teacher, batches, progress=False),
    ],
    ids=["reconstruct", "refine"],
)
def test_a_teacher_of_another_type_is_refused(fit):
    model, teacher = tiny_model("llama"), tiny_model("mistral")
    state, batches = model_state(model), tiny_batches(model)
    with pytest.raises(ModelError, match="the teacher is of the type 'mistral', the model of 'llama'"):
        fit(model, teacher, batches)
    assert_same_state(model, state)


@pytest.mark.parametrize("labels", [1, 2])
def test_a_teacher_with_another_head_is_no_measure_of_the_output(labels, caplog):
    """The repair needs the blocks only; outputs of different kinds or sizes are not compared."""
    model = tiny_model("bert", head="sequence-classification", num_labels=labels)
    teacher, batches = tiny_model("bert", head="sequence-classification", num_labels=3), tiny_batches(model)
    report = liar.reconstruct(model, every_other(model), batches, teacher=teacher, progress=False)
    assert report.quality is None
    assert "cannot be compared" in caplog.text
