"""Statistics that are collected once: they give the masks that batches give, from a file as well, and know their model."""

import pytest
import torch

import liar
from liar.criteria import CRITERIA, NEEDS
from liar.errors import CalibrationError, OptionError
from liar.testing import tiny_batches, tiny_model


@pytest.fixture(params=["bert", "llama"])
def subject(request):
    model = tiny_model(request.param)
    return model, tiny_batches(model, batches=3)


def test_one_collection_gives_the_masks_of_every_criterion_and_budget(subject, tmp_path):
    model, batches = subject
    statistics = liar.collect(model, batches, criteria=list(CRITERIA), progress=False)
    statistics.save(tmp_path / "statistics.safetensors")
    again = liar.Statistics.load(tmp_path / "statistics.safetensors")
    assert again.tokens == statistics.tokens == sum(int(batch["attention_mask"].sum()) for batch in batches)
    for criterion in CRITERIA:
        for keep in (0.8, 0.5):
            how = {"keep": keep, "criterion": criterion, "progress": False}
            assert liar.select(model, statistics, **how) == liar.select(model, batches, **how)
            assert liar.select(model, again, **how) == liar.select(model, batches, **how)


def test_only_what_is_needed_is_collected(subject):
    model, batches = subject
    for criterion, row in CRITERIA.items():
        found = liar.collect(model, batches, criteria=[criterion], progress=False)
        assert {name for known in found.sites.values() for name in known} == set(NEEDS[row.needs] if row.needs else ())


def test_what_was_not_collected_is_missed_by_name(subject):
    model, batches = subject
    statistics = liar.collect(model, batches, criteria=["fluctuation"], progress=False)
    with pytest.raises(CalibrationError, match=r"needs order and increases and kept .* criteria=\['reconstruction'\]"):
        liar.select(model, statistics, keep=0.5)
    with pytest.raises(OptionError, match="criterion"):
        liar.collect(model, batches, criteria=["best"])


def test_statistics_of_another_model_are_refused(subject):
    model, batches = subject
    statistics = liar.collect(model, batches, progress=False)
    liar.select(model.to(torch.float16), statistics, keep=0.5)  # rounding is no change
    model.float()
    next(block for name, block in model.named_modules() if name.endswith(("output.dense", "down_proj"))).weight.data *= 1.01
    with pytest.raises(CalibrationError, match="another model, or this one has changed"):
        liar.select(model, statistics, keep=0.5)


def test_a_layer_of_zeros_is_known_again():
    model = tiny_model("bert")
    model.encoder.layer[0].output.dense.weight.data.zero_()
    batches = tiny_batches(model)
    statistics = liar.collect(model, batches, progress=False)
    assert liar.select(model, statistics, keep=0.7) == liar.select(model, batches, keep=0.7, progress=False)


def test_a_file_that_is_something_else_is_refused(tmp_path):
    (tmp_path / "text").write_text("no statistics")
    for name in ("text", "missing"):
        with pytest.raises(CalibrationError, match=f"{name}: expected a file that Statistics.save wrote"):
            liar.Statistics.load(tmp_path / name)
