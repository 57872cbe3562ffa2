"""The output of the finished model beside the dense model's: the numbers, what they are made on, and what is said of them."""

import copy
import gc
import json
import logging
import weakref
from dataclasses import replace
from math import inf, nan

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, log_softmax

import liar
from liar import Report
from liar.data import Calibration, distinct_from, set_aside, spread
from liar.errors import CalibrationError, OptionError
from liar.options import TARGETS
from liar.repair import comparison
from liar.report import METRICS, Measure, Quality
from liar.testing import assert_same_state, model_state, tiny_batches, tiny_model
from liar.verdicts import OutputVerdict

MODELS = {
    "bare": ("bert", {}),
    "causal": ("llama", {"head": "causal-lm"}),
    "fused": ("gpt2", {"head": "causal-lm", "bos_token_id": 1, "eos_token_id": 2}),
    "parallel": ("gptj", {"head": "causal-lm"}),
    "masked": ("bert", {"head": "masked-lm"}),
    "classes": ("bert", {"head": "sequence-classification", "num_labels": 3}),
    "labels": ("bert", {"head": "sequence-classification", "num_labels": 3, "problem_type": "multi_label_classification"}),
    "number": ("bert", {"head": "sequence-classification", "num_labels": 1}),
    "tokens": ("bert", {"head": "token-classification", "num_labels": 5}),
    "span": ("bert", {"head": "question-answering"}),
    "images": ("vit", {}),
}


def made(name):
    kind, options = MODELS[name]
    return tiny_model(kind, **options)


def every_other(model):
    return liar.Mask({site.name: torch.arange(site.units) % 2 == 0 for site in liar.discover(model).sites})


def rows_of(model, batch):
    """Output name -> rows for the real tokens, or for the sequences, float64: as a user would compute them."""
    with torch.no_grad():
        returned = model(**batch)
    real = batch["attention_mask"].bool() if "attention_mask" in batch else None
    logits = {name: value for name, value in returned.items() if name.endswith("logits")}
    if not logits:
        hidden = returned.last_hidden_state.double()
        real = torch.ones(hidden.shape[:2], dtype=torch.bool) if real is None else real
        return {"hidden": torch.stack([one[mask].mean(0) for one, mask in zip(hidden, real, strict=True)]).numpy()}
    by_token = {name: value.ndim == 3 and value.shape[:2] == real.shape for name, value in logits.items()}
    spans = {"start_logits", "end_logits"}
    return {
        name: (value[real] if by_token[name] else value.masked_fill(~real, -1e30) if name in spans else value).double().numpy()
        for name, value in logits.items()
    }


def plain(model, dense, other, batches):
    """(output, metric) -> value, by NumPy, all rows at once."""
    pairs = [(rows_of(dense, batch), rows_of(other, batch)) for batch in batches]
    found = {}
    for name in pairs[0][0]:
        if name in ("start_logits", "end_logits"):
            # As many classes as positions: rows differ in length between batches.
            parts = [(log_softmax(one[name], -1), log_softmax(two[name], -1)) for one, two in pairs]
            found[name, "kl"] = np.concatenate([(np.exp(p) * (p - q)).sum(-1) for p, q in parts]).mean()
            found[name, "agreement"] = np.concatenate([p.argmax(-1) == q.argmax(-1) for p, q in parts]).mean()
            continue
        p, q = (np.concatenate([pair[side][name] for pair in pairs]) for side in (0, 1))
        if name == "hidden":
            lengths = np.linalg.norm(p, axis=-1) * np.linalg.norm(q, axis=-1)
            found[name, "cosine"] = ((p * q).sum(-1) / lengths).mean()
        elif model.config.problem_type == "multi_label_classification":
            a, b = expit(p), expit(q)
            found[name, "kl"] = (a * np.log(a / b) + (1 - a) * np.log((1 - a) / (1 - b))).sum(-1).mean()
            found[name, "agreement"] = ((p > 0) == (q > 0)).mean()
        elif p.shape[-1] == 1:
            found[name, "difference"] = np.sqrt(((p - q) ** 2).mean())
        else:
            a, b = log_softmax(p, -1), log_softmax(q, -1)
            found[name, "kl"] = (np.exp(a) * (a - b)).sum(-1).mean()
            found[name, "agreement"] = (a.argmax(-1) == b.argmax(-1)).mean()
    return found


def check_against_plain(model, dense, mask, batches, quality):
    bare = copy.deepcopy(dense)
    liar.remove(bare, mask)
    for attribute, other in (("repaired", model), ("mask_only", bare)):
        expected = plain(dense, dense, other, batches)
        actual = {(each.output, each.metric): getattr(each, attribute) for each in quality.measures}
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_allclose(actual[key], value, rtol=2e-4, atol=1e-7, err_msg=f"{attribute} {key}")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", MODELS)
def test_the_numbers_are_those_of_a_plain_computation(name, target):
    model = made(name)
    dense, mask = copy.deepcopy(model), every_other(model)
    held_out = tiny_batches(model, batches=2, sequences=3, seed=7, padding="left" if name == "causal" else "right")
    report = liar.reconstruct(model, mask, tiny_batches(model), held_out=held_out, quality=6, target=target, progress=False)
    assert (report.quality.sequences, report.quality.held_out) == (6, True)
    check_against_plain(model, dense, mask, held_out, report.quality)


def test_a_plain_computation_on_the_wrong_sequences_is_another():
    """The comparison above can fail."""
    model = made("causal")
    dense, mask = copy.deepcopy(model), every_other(model)
    held_out = tiny_batches(model, batches=1, sequences=3, seed=7)
    report = liar.reconstruct(model, mask, tiny_batches(model), held_out=held_out, quality=3, progress=False)
    with pytest.raises(AssertionError):
        check_against_plain(model, dense, mask, tiny_batches(model, batches=1, sequences=3, seed=8), report.quality)


def test_query_heads():
    model = tiny_model("llama", head="causal-lm")
    dense, batches = copy.deepcopy(model), tiny_batches(model)
    mask = liar.select(model, keep=0.6, criterion="magnitude", heads="query")
    held_out = tiny_batches(model, batches=1, sequences=4, seed=7)
    report = liar.reconstruct(model, mask, batches, held_out=held_out, progress=False)
    check_against_plain(model, dense, mask, held_out, report.quality)


@pytest.mark.parametrize("numbers", [1, 96 * 12 * 2])
def test_passes_of_any_size_give_the_same(numbers, monkeypatch):
    """Of one sequence and every second position where that is all that fits; of few sequences otherwise."""
    held_out = tiny_batches(made("masked"), batches=1, sequences=5, seed=3)
    results = []
    for limit in (comparison.NUMBERS, numbers):
        monkeypatch.setattr(comparison, "NUMBERS", limit)
        model = made("masked")
        results.append(
            liar.reconstruct(model, every_other(model), tiny_batches(model), held_out=held_out, progress=False).quality
        )
    first, second = results
    assert first.predictions == second.predictions == int(held_out[0]["attention_mask"].sum())
    for one, two in zip(first.measures, second.measures, strict=True):
        np.testing.assert_allclose([one.repaired, one.mask_only], [two.repaired, two.mask_only], rtol=1e-5)


def test_where_one_sequence_does_not_fit_some_positions_are_compared(monkeypatch):
    monkeypatch.setattr(comparison, "NUMBERS", 96 * 12 // 3)
    model = made("causal")
    held_out = tiny_batches(model, batches=1, sequences=5, seed=3, padding=None)
    report = liar.reconstruct(model, every_other(model), tiny_batches(model), held_out=held_out, progress=False)
    assert report.quality.predictions == 5 * 12 // 3
    assert report.quality.tokens == 5 * 12


def test_the_weights_do_not_depend_on_the_comparison():
    states = []
    for options in ({"quality": 0}, {}, {"quality": 3}, {"held_out": tiny_batches(made("causal"), seed=9)}):
        model = made("causal")
        report = liar.prune(model, tiny_batches(model), keep=0.5, progress=False, **options)
        states.append(model.state_dict())
        assert (report.quality is None) == (options == {"quality": 0})
    for other in states[1:]:
        for name, value in states[0].items():
            assert torch.equal(value, other[name]), name


def test_few_sequences_by_default_and_it_says_what_they_are():
    model = made("bare")
    report = liar.prune(model, tiny_batches(model), keep=0.5, progress=False)
    quality = report.quality
    assert (quality.sequences, quality.held_out) == (comparison.FEW, False)
    assert quality.verdict is OutputVerdict.BETTER_ON_SEEN
    assert "4 sequences" in str(report)
    assert "seen by the fit" in str(report)
    assert "quality" in report.seconds
    assert [comparison.sequences_to_compare("auto", n) for n in (1, 8, 24, 32, 128, 256, 512, 10_000)] == [
        1,
        1,
        3,
        4,
        4,
        8,
        16,
        16,
    ]
    assert [comparison.sequences_to_compare(n, 100) for n in (0, 5, 500)] == [0, 5, 500]


def test_the_users_model_is_left_alone_by_an_error_on_the_way(monkeypatch):
    model = made("classes").train()
    before = model_state(model)
    batches = tiny_batches(model)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "distances", stop)
    with pytest.raises(KeyboardInterrupt):
        liar.prune(model, batches, keep=0.5, progress=False)
    assert_same_state(model, before)


def test_outputs_that_cannot_be_compared_do_not_stop_the_repair(caplog):
    """The head of the model breaks; the blocks are none the worse."""
    model = made("classes")
    model.classifier = torch.nn.Linear(3, 3)
    with caplog.at_level(logging.WARNING, "liar"):
        report = liar.reconstruct(model, every_other(model), tiny_batches(model), progress=False)
    assert report.quality is None
    assert "the output was not compared with the dense model's" in caplog.text


def test_a_repair_that_makes_it_worse_is_called_so(caplog):
    """Without a ridge, few tokens are learned by heart: the sites fit, and other text suffers."""
    model = tiny_model("llama", head="causal-lm", intermediate_size=256)
    calib = tiny_batches(model, batches=2, sequences=8, length=8)
    mask = liar.Mask({site.name: torch.arange(site.units) < site.units - 1 for site in liar.discover(model).sites})
    with caplog.at_level(logging.WARNING, "liar"):
        report = liar.reconstruct(
            model, mask, calib, ridge=1e-9, held_out=tiny_batches(model, seed=5), quality=16, progress=False
        )
    assert report.quality.measures[0].repaired > report.quality.measures[0].mask_only
    assert report.quality.verdict is OutputVerdict.NOT_BETTER
    assert "on 16 sequences" in caplog.text
    assert "no closer to the dense model than with the mask alone" in caplog.text
    assert "not_better: " in str(report)


def test_nothing_removed_is_no_news(caplog):
    model = made("classes")
    mask = liar.Mask({site.name: torch.ones(site.units, dtype=torch.bool) for site in liar.discover(model).sites})
    report = liar.reconstruct(model, mask, tiny_batches(model), progress=False)
    assert report.quality.verdict is OutputVerdict.UNCHANGED
    assert not caplog.text


# What is compared


def test_what_is_set_aside_is_as_if_it_had_not_been_there():
    model, other = made("classes"), made("classes")
    batches = [{**batch, "labels": torch.arange(8) % 3} for batch in tiny_batches(model)]
    how = {"keep": 0.5, "criterion": "taylor", "progress": False}
    report = liar.prune(model, batches, quality=5, set_aside=True, **how)
    rest, aside = set_aside(Calibration.of(batches, other), 5)
    assert (report.sequences, report.quality.sequences, report.quality.held_out) == (27, 5, True)
    assert report.tokens == rest.tokens == report.tokens
    again = [{**batch, "labels": labels} for batch, labels in zip(rest.batches, rest.labels, strict=True)]
    expected = liar.prune(other, again, quality=0, **how)
    assert report.distinct_tokens == expected.distinct_tokens
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    rows = [{tuple(row.tolist()) for batch in part.batches for row in batch["input_ids"]} for part in (rest, aside)]
    assert not rows[0] & rows[1]
    assert len(rows[0] | rows[1]) == 32


def test_copies_are_never_set_aside():
    model = made("bare")
    ids = tiny_batches(model, batches=1, sequences=6, padding=None)[0]["input_ids"]
    # The first three come twice, the last three once.
    calibration = Calibration.of([torch.cat([ids, ids[:3]])], model)
    for count in (1, 2, 5):
        rest, aside = set_aside(calibration, count)
        rows = {tuple(row.tolist()) for row in aside.batches[0]["input_ids"]}
        assert rows <= {tuple(row.tolist()) for row in ids[3:]}
        assert aside.sequences == min(count, 2) == 9 - rest.sequences
    with pytest.raises(CalibrationError, match="each of the 6 calibration sequences repeats another"):
        set_aside(Calibration.of([torch.cat([ids[:3], ids[:3]])], model), 1)
    with pytest.raises(CalibrationError, match="expected at least 2 calibration sequences, got 1"):
        set_aside(Calibration.of([ids[:1]], model), 1)


def test_held_out_sequences_that_repeat_calibration_sequences_are_left_out(caplog):
    model = made("bare")
    calib, new = tiny_batches(model), tiny_batches(model, batches=1, seed=5)
    both = [{name: torch.cat([calib[0][name], new[0][name]]) for name in new[0]}]
    is_new = distinct_from(Calibration.of(both, model), Calibration.of(calib, model))
    assert is_new.tolist() == [False] * 8 + [True] * 8
    report = liar.prune(model, calib, keep=0.5, held_out=both, progress=False)
    assert (report.quality.sequences, report.quality.held_out) == (8, True)
    assert "8 of 16 held-out sequences repeat calibration sequences, or nearly, and are left out" in caplog.text


def test_held_out_sequences_that_are_all_copies_count_as_seen(caplog):
    model = made("bare")
    calib = tiny_batches(model)
    report = liar.prune(model, calib, keep=0.5, held_out=calib[:1], progress=False)
    assert (report.quality.sequences, report.quality.held_out) == (8, False)
    assert "8 of 8 held-out sequences repeat calibration sequences" in caplog.text
    assert "has been seen by the fit" in caplog.text


@given(sequences=st.integers(1, 40), count=st.integers(1, 50), seed=st.integers(0, 9))
def test_sequences_are_spread_evenly(sequences, count, seed):
    calibration = Calibration.of([torch.randint(1, 90, (sequences, 3))], made("bare"))
    among = torch.rand(sequences, generator=torch.Generator().manual_seed(seed)) < 0.7
    for allowed in (None, among):
        places = torch.arange(sequences) if allowed is None else allowed.nonzero().squeeze(1)
        chosen = spread(calibration, count, allowed).nonzero().squeeze(1)
        assert len(chosen) == min(count, len(places))
        assert set(chosen.tolist()) <= set(places.tolist())
        gaps = torch.searchsorted(places, chosen).diff()
        assert not len(gaps) or gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"quality": 0, "set_aside": True}, "set_aside=True says which sequences are compared, and quality=0 that none are"),
        ({"quality": 0, "held_out": "batches"}, "held_out says which sequences are compared, and quality=0 that none are"),
        ({"set_aside": True, "held_out": "batches"}, "set_aside=True and held_out both say which sequences are compared"),
    ],
)
def test_options_that_contradict_each_other(options, says):
    model = made("bare")
    batches = tiny_batches(model)
    options = {name: batches if value == "batches" else value for name, value in options.items()}
    for verb in (
        lambda: liar.prune(model, batches, keep=0.5, **options),
        lambda: liar.reconstruct(model, {}, batches, **options),
    ):
        with pytest.raises(OptionError, match=says):
            verb()


# What is said

MEASURES = [
    ("kl", 0.1, 0.2, True), ("kl", 0.2, 0.2, False), ("kl", 0.3, 0.2, False), ("kl", nan, 0.2, False), ("kl", 0.1, nan, True),
    ("kl", nan, nan, False), ("kl", 0.1, inf, True), ("kl", inf, inf, False), ("agreement", 0.9, 0.9, True),
    ("agreement", 0.8, 0.9, False), ("agreement", 1.0, 0.9, True), ("agreement", nan, 0.9, False), ("cosine", 0.9, 0.8, True),
    ("cosine", 0.9, 0.9, False), ("cosine", -1.0, 0.9, False), ("difference", 0.1, 0.2, True), ("difference", 0.2, 0.1, False),
]  # fmt: skip


@pytest.mark.parametrize(("metric", "repaired", "mask_only", "is_better"), MEASURES)
def test_a_measure_is_better_or_not(metric, repaired, mask_only, is_better):
    assert Measure("logits", metric, repaired, mask_only).is_better is is_better


numbers = st.floats(0, 1) | st.sampled_from([nan, inf, 0.0, 1.0, 1e-9])
measures = st.builds(Measure, st.just("logits"), st.sampled_from(list(METRICS)), numbers, numbers)


@given(st.lists(measures, min_size=1, max_size=4).map(tuple), st.booleans())
def test_no_repair_is_called_good_that_is_worse_in_anything(many, held_out):
    quality = Quality(many, 4, 40, 40, held_out)
    verdict = quality.verdict
    if verdict in (OutputVerdict.BETTER, OutputVerdict.BETTER_ON_SEEN):
        for each in many:
            perfect = METRICS[each.metric].perfect
            assert abs(each.repaired - perfect) <= max(abs(each.mask_only - perfect), 1e-6) or each.mask_only != each.mask_only
        assert held_out == (verdict is OutputVerdict.BETTER)
    report = Report((), None, 0.5, (2, 1), 1, 1, {}, "float32", quality=quality)
    assert verdict.text in " ".join(report.quality.lines())


@given(st.lists(measures, max_size=4).map(tuple), st.booleans())
def test_the_comparison_goes_through_json(many, held_out):
    model_report = Report(
        (liar.report.SiteReport("heads.0", "m", 1, 2, 0.5, 0.2, liar.Verdict.OK, 0.0, 1.0, 0.1),), 0.5, 0.5, (2, 1), 9, 3, {},
        "float32", {}, Quality(many, 4, 40, 40, held_out), 8, (1, 2, 6), liar.report.CostChange("seconds", 1.0, 0.5),
    )  # fmt: skip
    assert repr(Report.from_json(model_report.to_json())) == repr(model_report)


def test_reports_of_earlier_versions_load():
    model = made("bare")
    content = json.loads(liar.prune(model, tiny_batches(model), keep=0.5, progress=False).to_json())
    for name in ("quality", "distinct_tokens", "lengths", "cost"):
        del content[name]
    report = Report.from_json(json.dumps(content))
    assert (report.quality, report.distinct_tokens, report.lengths, report.cost) == (None,) * 4
    assert "compared" not in str(report)
    assert replace(report, quality=None) == report


def test_no_second_model_is_in_memory():
    """Blocks of the mask alone are cut when they run, and gone before the next one does."""
    model = tiny_model("bert", num_hidden_layers=6)
    alive, most = weakref.WeakSet(), []
    cut_site = comparison.cut_site

    def counted(block, site, mask):
        alive.add(block)
        most.append(len(alive))
        cut_site(block, site, mask)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "cut_site", counted)
        gc.collect()
        gc.disable()
        try:
            liar.reconstruct(model, every_other(model), tiny_batches(model), progress=False)
        finally:
            gc.enable()
    # Both sites of every block, for each of the four batches that a compared sequence comes from.
    assert len(most) == 2 * 6 * 4
    assert max(most) == 1
