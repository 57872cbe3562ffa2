"""Statistics that are collected once: they give the masks that batches give, from a file as well, and know their model.

And the sums they are made of: the same however the sequences are batched or shared among processes.
"""

import io
from contextlib import contextmanager
from dataclasses import astuple
from importlib import import_module

import pytest
import torch
from cases import quiet

import liar
from liar.errors import CalibrationError, OptionError
from liar.models import layout_of
from liar.options import ReconstructOptions
from liar.repair import RepairContext, closed_form_steps, walk_blocks
from liar.runtime import preserve_model_state
from liar.selection import CRITERIA, STATISTICS, fisher, gradients
from liar.statistics import ChannelMoments, Factor, Folds, Moments, TokenIndex
from liar.testing import tiny_batches, tiny_model


@pytest.fixture(params=["bert", "llama", "gpt2"])
def subject(request):
    model = tiny_model(request.param)
    return model, tiny_batches(model, batches=3)


def test_one_collection_gives_the_masks_of_every_criterion_and_budget(subject, tmp_path):
    model, batches = subject
    statistics = liar.collect(model, batches, criteria=list(CRITERIA), progress=False)
    statistics.save(tmp_path / "statistics.safetensors")
    again = liar.CriterionStatistics.load(tmp_path / "statistics.safetensors")
    assert again.tokens == statistics.tokens == sum(int(batch["attention_mask"].sum()) for batch in batches)
    for criterion in CRITERIA:
        for keep in (0.8, 0.5):
            how = {"keep": keep, "criterion": criterion, "progress": False}
            assert liar.select(model, statistics, **how) == liar.select(model, batches, **how)
            assert liar.select(model, again, **how) == liar.select(model, batches, **how)


def test_only_what_is_needed_is_collected(subject):
    model, batches = subject
    for criterion, row in CRITERIA.items():
        result = liar.collect(model, batches, criteria=[criterion], progress=False)
        assert {name for tensors in result.sites.values() for name in tensors} == set(
            STATISTICS[row.needs] if row.needs else ()
        )


def test_what_was_not_collected_is_missed_by_name(subject):
    model, batches = subject
    statistics = liar.collect(model, batches, criteria=["fluctuation"], progress=False)
    with pytest.raises(CalibrationError, match=r"needs order and increases of every site, .* criteria=\['reconstruction'\]"):
        liar.select(model, statistics, keep=0.5)
    with pytest.raises(OptionError, match="criterion"):
        liar.collect(model, batches, criteria=["best"])


def test_statistics_of_another_model_are_refused(subject):
    model, batches = subject
    statistics = liar.collect(model, batches, progress=False)
    liar.select(model.to(torch.float16), statistics, keep=0.5)  # rounding is no change
    model.float()
    next(
        block for name, block in model.named_modules() if name.endswith(("output.dense", "down_proj", "c_proj"))
    ).weight.data *= 1.01
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
        with pytest.raises(CalibrationError, match=f"{name}: expected a file that CriterionStatistics.save wrote"):
            liar.CriterionStatistics.load(tmp_path / name)


# The same sequences, batched or shared otherwise

MODEL = tiny_model("bert", head="sequence-classification", dtype=torch.float64, intermediate_size=12)
LAYOUT = layout_of(MODEL)
BATCHES = tiny_batches(MODEL, batches=4, sequences=3, length=10)
ALL_DATA = liar.Calibration.of(BATCHES, MODEL)
# Sequences 0 to 2 belong to the first process, 3 to 11 to the second.
PARTS = tuple(
    liar.Calibration.of(batches, MODEL, first_sequence=first, total_tokens=ALL_DATA.tokens)
    for batches, first in ((BATCHES[:1], 0), (BATCHES[1:], 3))
)
# The second process does not know that there is a first one.
MISPLACED = (PARTS[0], liar.Calibration.of(BATCHES[1:], MODEL, total_tokens=ALL_DATA.tokens))


def single_sequences(batches):
    return [
        {name: value[i : i + 1] for name, value in batch.items()} for batch in batches for i in range(len(batch["input_ids"]))
    ]


@contextmanager
def recorded(module, name):
    """The accumulators of one class that a module makes meanwhile."""
    kind, built = getattr(module, name), []

    def build(*arguments):
        built.append(kind(*arguments))
        return built[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, build)
        yield built


def channel_moments(calibration):
    with recorded(import_module("liar.analysis.moments"), "ChannelMoments") as built:
        liar.analysis.channel_moments(MODEL, LAYOUT, calibration, progress=quiet())
    return built, lambda part: (part.count, part.mean, part.variance)


def moments(calibration):
    return list(liar.moments(MODEL, calibration, progress=False).values()), lambda part: numbers(part.normal(affine=True))


def unit_gradients(calibration):
    with recorded(gradients, "UnitGradients") as built:
        gradients.unit_gradients(MODEL, LAYOUT, calibration, progress=quiet())
    return built, lambda part: tuple(part.result().values())


def gradient_moments(calibration):
    with recorded(fisher, "GradientMoments") as built:
        fisher.sensitivities(MODEL, LAYOUT, calibration, progress=quiet())
    return built, lambda part: (part.squares, part.coherence())


def folds(calibration, solver="auto"):
    built = []

    class Recording(RepairContext):
        def new_folds(self, *args):
            built.append(super().new_folds(*args))
            return built[-1]

    mask = liar.Mask.of({"heads": [[0, 2], [1]], "neurons": [range(5), range(3, 9)]}, LAYOUT)
    context = Recording(ReconstructOptions(target="layer_output", solver=solver), lambda: None)
    with preserve_model_state(MODEL):
        walk_blocks(MODEL, LAYOUT, calibration, closed_form_steps(context), mask=mask, has_pruned_stream=False)

    def result(part):
        all_data, splits = part.normals(affine=True, channels=1000)
        normals = [all_data, *(normal for pair in splits for normal in pair)]
        return tuple(number for normal in normals for number in numbers(normal))

    return [part for part in built if any(part.state_dict()["parts"])], result


def folds_of_factors(calibration):
    return folds(calibration, solver="lstsq")


def numbers(normal):
    """What a solver reads of normal equations, whatever the signs of a factor's rows."""
    return normal.count, normal.weight_sum, normal.gram, normal.cross, normal.target_energy, normal.mean_z, normal.mean_t


# name -> (accumulators of all sites, and what they say), from a calibration; relative tolerance (some sum in float32).
ACCUMULATORS = {
    "ChannelMoments": (channel_moments, 1e-9),
    "Moments": (moments, 1e-9),
    "UnitGradients": (unit_gradients, 1e-9),
    "GradientMoments": (gradient_moments, 1e-4),
    "Folds of Moments": (folds, 1e-9),
    "Folds of Factor": (folds_of_factors, 1e-9),
}


def assert_close(results, expected, rtol):
    assert len(results) == len(expected)
    for one, other in zip(results, expected, strict=True):
        one, other = torch.as_tensor(one), torch.as_tensor(other)
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol * float(other.abs().max()) if other.numel() else 0)


@pytest.mark.parametrize("name", ACCUMULATORS)
def test_merged_sums_of_two_processes_are_those_of_one(name):
    accumulate, rtol = ACCUMULATORS[name]
    expected, result = accumulate(ALL_DATA)
    first, second = (accumulate(part)[0] for part in PARTS)
    assert len(first) == len(second) == len(expected) > 0
    for mine, theirs, all_of_it in zip(first, second, expected, strict=True):
        before = result(theirs)
        mine.merge(theirs)
        assert_close(result(mine), result(all_of_it), rtol)
        assert_close(result(theirs), before, 0)


@pytest.mark.parametrize("name", ["UnitGradients", "GradientMoments", "Folds of Moments", "Folds of Factor"])
def test_merged_sums_depend_on_the_number_of_the_first_sequence(name):
    """Negative control: labels are sampled and folds assigned by it."""
    accumulate, rtol = ACCUMULATORS[name]
    expected, result = accumulate(ALL_DATA)
    first, second = (accumulate(part)[0] for part in MISPLACED)
    for mine, theirs, all_of_it in zip(first, second, expected, strict=True):
        mine.merge(theirs)
        with pytest.raises(AssertionError):
            assert_close(result(mine), result(all_of_it), rtol)


@pytest.mark.parametrize("name", ACCUMULATORS)
def test_sums_do_not_depend_on_batching(name):
    accumulate, rtol = ACCUMULATORS[name]
    expected, result = accumulate(ALL_DATA)
    parts, _ = accumulate(liar.Calibration.of(single_sequences(BATCHES), MODEL))
    for part, all_of_it in zip(parts, expected, strict=True):
        assert_close(result(part), result(all_of_it), rtol)


def test_collected_statistics_do_not_depend_on_batching():
    expected, result = (
        liar.collect(MODEL, data, criteria=list(CRITERIA), progress=False).sites
        for data in (BATCHES, single_sequences(BATCHES))
    )
    for site, tensors in expected.items():
        assert torch.equal(result[site]["order"], tensors["order"])
        for name, value in tensors.items():
            assert_close([result[site][name]], [value], 1e-4 if name == "increases" else 1e-9)


def test_sampled_labels_follow_the_order_of_the_sequences():
    """Negative control: other numbers, other labels."""
    one, other = (
        gradients.unit_gradients(MODEL, LAYOUT, liar.Calibration.of(data, MODEL), progress=quiet())["neurons.1"]["gradient"]
        for data in (BATCHES, BATCHES[::-1])
    )
    assert not torch.allclose(one, other, rtol=1e-3)


# Going on later

GENERATOR = torch.Generator().manual_seed(0)
ROWS = [torch.randn(30, 5, generator=GENERATOR, dtype=torch.float64) + 2 for _ in range(4)]
SITE = LAYOUT["neurons.0"]
BLOCK = MODEL.get_submodule(SITE.block)


def update_unit_gradients(accumulator, rows):
    """As if 30 rows were 6 sequences of 5 tokens of a site with 12 channels."""
    x = torch.cat([rows, rows, rows[:, :2]], 1).view(6, 5, 12)
    accumulator.update(x, x.cos(), [torch.full_like(weight, float(rows.sum())) for weight in accumulator.weights])


# name -> (an empty accumulator, adding 30 rows [30, 5] to it, what it says)
RESUMED = {
    "ChannelMoments": (ChannelMoments, lambda a, rows: a.update(rows), lambda a: (a.count, a.mean, a.variance)),
    "Moments": (Moments, lambda a, rows: a.update(rows, rows[:, :2].sin()), lambda a: astuple(a.normal(affine=True))),
    "Moments, weighted": (
        Moments,
        lambda a, rows: a.update(rows, rows[:, :2].sin(), rows[:, 0].abs()),
        lambda a: astuple(a.normal(affine=False)),
    ),
    "Factor": (Factor, lambda a, rows: a.update(rows, rows[:, :2].sin()), lambda a: astuple(a.normal(affine=True))),
    "Folds": (
        lambda: Folds(3),
        lambda a, rows: a.update(rows[None], rows[None, :, :2].sin(), TokenIndex(torch.arange(30), (5, 15, 10))),
        lambda a: tuple(v for pair in a.normals(affine=True, channels=100)[1] for normal in pair for v in astuple(normal)),
    ),
    "Folds of Factor": (
        lambda: Folds(3, Factor),
        lambda a, rows: a.update(rows[None], rows[None, :, :2].sin(), TokenIndex(torch.arange(30), (5, 15, 10))),
        lambda a: tuple(v for pair in a.normals(affine=True, channels=100)[1] for normal in pair for v in astuple(normal)),
    ),
    "GradientMoments": (
        lambda: fisher.GradientMoments(torch.zeros(5)),
        lambda a, rows: a.update(rows.float(), torch.ones(6, 5, dtype=torch.bool)),
        lambda a: (a.squares, a.coherence()),
    ),
    "UnitGradients": (
        lambda: gradients.UnitGradients(BLOCK, SITE),
        update_unit_gradients,
        lambda a: tuple(a.result().values()),
    ),
}


def flat(values):
    """Tensors and numbers out of tuples in tuples; what is None is left out."""
    for value in values:
        yield from flat(value) if isinstance(value, tuple) else [] if value is None else [torch.as_tensor(value)]


def assert_identical(results, expected):
    for one, other in zip(flat(results), flat(expected), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", RESUMED)
def test_saved_sums_go_on_exactly(name):
    """Through a file that torch.load reads without unpickling objects; the sums that were saved are left alone."""
    build, update, result = RESUMED[name]
    straight, stopped, resumed = build(), build(), build()
    for rows in ROWS[:2]:
        update(straight, rows)
        update(stopped, rows)
    # What is pending is written into the sums when they are read: so at the same moment in both.
    straight.state_dict()
    # An accumulator that has seen something else loses it.
    update(resumed, ROWS[3])
    file = io.BytesIO()
    torch.save(stopped.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert_identical(result(resumed), result(stopped))
    for rows in ROWS[2:]:
        update(straight, rows)
        update(resumed, rows)
    assert_identical(result(resumed), result(straight))


@pytest.mark.parametrize("name", RESUMED)
def test_loaded_sums_are_a_copy(name):
    build, update, result = RESUMED[name]
    stopped, resumed, expected = build(), build(), build()
    for accumulator in (stopped, expected):
        update(accumulator, ROWS[0])
    resumed.load_state_dict(stopped.state_dict())
    update(resumed, ROWS[1])
    assert_identical(result(stopped), result(expected))


@pytest.mark.parametrize("name", ["Moments", "Factor", "Folds", "Folds of Factor", "ChannelMoments"])
def test_an_empty_state_empties(name):
    build, update, result = RESUMED[name]
    resumed = build()
    update(resumed, ROWS[0])
    resumed.load_state_dict(build().state_dict())
    for rows in ROWS[1:3]:
        update(resumed, rows)
    expected = build()
    for rows in ROWS[1:3]:
        update(expected, rows)
    assert_identical(result(resumed), result(expected))


def test_a_name_is_not_a_list_of_names():
    """Its letters would be taken one by one."""
    model = tiny_model("bert")
    with pytest.raises(OptionError, match="criteria='wanda': expected a list of names, got a str"):
        liar.collect(model, tiny_batches(model), criteria="wanda")
    with pytest.raises(OptionError, match=r"sites='neurons\.0': expected a list of names, got a str"):
        liar.moments(model, tiny_batches(model), sites="neurons.0")
