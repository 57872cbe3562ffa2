"""Statistics that are collected once: they give the masks that batches give, from a file as well, and know their model."""

from dataclasses import replace

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


@pytest.mark.parametrize("how", [{}, {"scope": "layer"}, {"round_to": 2}, {"uniform": True}, {"drop": True}])
def test_the_set_of_its_size_is_kept_where_sets_are_not_nested(subject, how):
    """Sets that no order of the units could give: the first ones, or if there is one only, the last one."""
    model, batches = subject
    statistics = liar.collect(model, batches, criteria=["reconstruction", "wanda"], progress=False)
    sites = {}
    for name, known in statistics.sites.items():
        units = len(known["order"])
        sets = torch.arange(units)[None] < torch.arange(units + 1)[:, None]
        sets[1] = sets[1].flip(0)
        sites[name] = {**known, "kept": sets}
    changed = replace(statistics, sites=sites)
    before, after = (liar.select(model, each, keep=0.6, progress=False, **how) for each in (statistics, changed))
    for name, keep in after.keep.items():
        assert after.kept(name) == before.kept(name)
        assert torch.equal(keep, sites[name]["kept"][after.kept(name)])
    assert after != before
    # Criteria that score units for themselves have no use for sets.
    assert liar.select(model, changed, keep=0.6, criterion="wanda") == liar.select(
        model, statistics, keep=0.6, criterion="wanda"
    )


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
