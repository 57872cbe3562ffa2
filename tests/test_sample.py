"""Samples of the calibration data: whole sequences, the same however they are batched; and what is estimated from them."""

import dataclasses

import pytest
import torch
from cases import MODELS, quiet
from hypothesis import given, settings
from hypothesis import strategies as st

import liar
from liar.data import Calibration, sample, sample_tokens, split, take
from liar.errors import CalibrationError
from liar.models import layout_of
from liar.repair import closed_form
from liar.runtime import drawn, outputs_of
from liar.selection import error_curves, fisher
from liar.testing import tiny_batches, tiny_model

MODEL = tiny_model("bert")


def calibration_of(lengths, batch_size, model=MODEL):
    """Sequences of some lengths, of which every token tells where it comes from, with labels."""
    batches = []
    for start in range(0, len(lengths), batch_size):
        part = lengths[start : start + batch_size]
        ids, mask = torch.zeros(2, len(part), max(part), dtype=torch.int64)
        for row, length in enumerate(part):
            ids[row, :length] = (3 * (start + row) + torch.arange(length)) % 90 + 1
            mask[row, :length] = 1
        labels = torch.arange(start, start + len(part))
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return Calibration.of(batches, model)


def sequences(calibration):
    """The tokens of every sequence, its label and its folds."""
    found = []
    for batch, mask, folds, labels in zip(
        calibration.batches, calibration.token_masks, calibration.folds, calibration.labels, strict=True
    ):
        sizes = mask.sum(1).tolist()
        rows = [row[keep].tolist() for row, keep in zip(batch["input_ids"], mask, strict=True)]
        found += zip(rows, labels.tolist(), [part.tolist() for part in torch.split(folds, sizes)], strict=True)
    return found


@given(st.lists(st.integers(1, 12), min_size=1, max_size=60), st.integers(1, 9), st.integers(1, 9), st.integers(1, 300))
@settings(deadline=None, max_examples=40)
def test_a_sample_is_of_whole_sequences_whatever_the_batches(lengths, one, other, tokens):
    whole = calibration_of(lengths, one)
    part = sample(whole, tokens)
    assert set(map(str, sequences(part))) <= set(map(str, sequences(whole)))
    assert part.tokens == sum(len(row) for row, _, _ in sequences(part)) > 0
    assert part.sequences == len(sequences(part))
    assert [row[:2] for row in sequences(sample(calibration_of(lengths, other), tokens))] == [
        row[:2] for row in sequences(part)
    ]
    if tokens >= whole.tokens:
        assert part is whole


def test_a_sample_has_about_the_tokens_asked_for_spread_evenly():
    whole = calibration_of([10] * 900, 32)
    part = sample(whole, 3000)
    assert part.tokens == pytest.approx(3000, rel=0.02)
    labels = torch.tensor([label for _, label, _ in sequences(part)])
    # Every stretch of 90 of the 900 sequences gives 30, and so does every residue of a period.
    assert torch.bincount(labels // 90).sub(30).abs().max() <= 2
    assert torch.bincount(labels % 10).sub(30).abs().max() <= 2


def test_a_few_long_sequences_are_not_a_sample():
    whole = calibration_of([10] * 100, 32)
    assert sample(whole, 10, sequences=50).sequences == pytest.approx(50, abs=2)


def test_smaller_batches_have_the_same_sequences():
    whole = calibration_of([3, 9, 4, 7, 5, 6, 8], 5)
    pieces = split(whole, 2)
    assert sequences(pieces) == sequences(whole)
    assert [len(mask) for mask in pieces.token_masks] == [2, 2, 1, 2]


def test_what_has_no_row_for_each_sequence_serves_all():
    batch = {"input_ids": torch.ones(4, 6, dtype=torch.int64), "position_ids": torch.arange(6)[None]}
    whole = Calibration.of([batch], MODEL)
    part = take(whole, [(0, torch.tensor([1, 3]))])
    assert part.batches[0]["input_ids"].shape == (2, 6)
    assert part.batches[0]["position_ids"].shape == (1, 6)


def places(calibration, share):
    """(global number of the sequence, place in it) of all sampled tokens, without looking at the padding."""
    found = []
    for number, (start, mask) in enumerate(zip(calibration.starts, calibration.token_masks, strict=True)):
        chosen = sample_tokens(calibration, number, share)
        assert not (chosen & ~mask).any()
        place = (mask.cumsum(1) - 1)[chosen]
        found += zip((chosen.nonzero()[:, 0] + start).tolist(), place.tolist(), strict=True)
    return found


@given(st.lists(st.integers(1, 12), min_size=1, max_size=40), st.integers(1, 9), st.integers(1, 9), st.floats(0.02, 1.2))
@settings(deadline=None, max_examples=40)
def test_a_sample_of_tokens_does_not_depend_on_batches_and_padding(lengths, one, other, share):
    chosen = places(calibration_of(lengths, one), share)
    assert chosen == places(calibration_of(lengths, other), share)
    left = calibration_of(lengths, other)
    flipped = dataclasses.replace(left, token_masks=tuple(mask.flip(1) for mask in left.token_masks))
    assert chosen == places(flipped, share)
    assert len(chosen) == sum(lengths) or share < 1


# A constant length has a period, which a rule that counts through the tokens would fall in with; short sequences in small
# batches would get nothing from one that counts anew for each of them.
@pytest.mark.parametrize("length", [1, 4, 8, 32, 61])
@pytest.mark.parametrize("share", [60 / 128, 0.5, 0.625, 0.1, 1 / 32])
def test_sampled_tokens_are_of_all_sequences_places_and_folds(length, share):
    count = 4_000 // length
    whole = calibration_of([length] * count, 1 if length > 8 else 50)
    chosen = places(whole, share)
    assert len(chosen) == pytest.approx(share * length * count, rel=0.06)
    by_place = torch.bincount(torch.tensor([place for _, place in chosen]), minlength=length)
    assert (by_place - share * count).abs().max() <= 0.1 * count + 4
    by_half = torch.bincount(torch.tensor([2 * number // count for number, _ in chosen]), minlength=2)
    assert (by_half - share * length * count / 2).abs().max() <= 0.06 * share * length * count + 2
    folds = torch.cat([whole.folds[i][sample_tokens(whole, i, share)[mask]] for i, mask in enumerate(whole.token_masks)])
    all_folds = torch.bincount(torch.cat(whole.folds), minlength=4)
    assert (torch.bincount(folds, minlength=4) - share * all_folds).abs().max() <= 0.1 * share * len(torch.cat(whole.folds)) + 4


def test_short_texts_in_small_batches_are_refitted():
    """Every batch has fewer tokens than one over the share."""
    model = tiny_model("bert", hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1)
    calib = [{"input_ids": ids} for ids in torch.randint(1, 90, (200, 2, 6), generator=torch.Generator().manual_seed(0))]
    mask = liar.select(model, calib, keep=0.5, criterion="random", progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(closed_form, "TOKENS", 100)
        patch.setattr(closed_form, "ROWS", 1)
        report = liar.reconstruct(model, mask, calib, progress=False)
    assert all(site.after < site.before for site in report.sites)


def test_where_only_padding_is_drawn_all_is_taken():
    ids = torch.arange(50)[:, None] % 90 + torch.zeros(1, 5, dtype=torch.int64)
    chosen = [label for _, label, _ in sequences(sample(calibration_of([5] * 50, 10), 1, sequences=3))]
    assert chosen
    mask = torch.ones_like(ids)
    mask[chosen] = 0
    whole = Calibration.of([{"input_ids": ids, "attention_mask": mask}], MODEL)
    assert sample(whole, 1, sequences=3) is whole


def test_a_label_for_all_sequences_serves_all():
    """One number for a batch is kept; only labels that have a row for each sequence are cut."""
    whole = Calibration.of([{"input_ids": torch.ones(4, 6, dtype=torch.int64), "labels": torch.tensor(1)}], MODEL)
    assert take(whole, [(0, torch.tensor([1, 3]))]).labels[0].shape == ()


@pytest.mark.parametrize("criterion", ["reconstruction", "fisher", "fluctuation"])
def test_errors_name_the_batch_that_was_given(criterion, monkeypatch):
    """A sample has batches of its own."""
    monkeypatch.setattr(fisher, "TOKENS", 40)
    monkeypatch.setattr(fisher, "SEQUENCES", 1)
    monkeypatch.setattr(error_curves, "TOKENS", 40)
    monkeypatch.setattr(error_curves, "ROWS", 0)
    model = tiny_model("bert", head="sequence-classification")
    calib = [{"input_ids": torch.ones(1, 10, dtype=torch.int64)} for _ in range(40)]
    numbers = sample(Calibration.of(calib, model), 40).numbers
    bad = numbers[2]
    assert bad > 2
    calib[bad] = {"input_ids": torch.ones(1, 65, dtype=torch.int64)}
    with pytest.raises(CalibrationError, match=f"calibration batch {bad} "):
        liar.select(model, calib, keep=0.5, criterion=criterion, progress=False)


# What is estimated from a sample


def prepared(name, sequences=64, length=16):
    model = tiny_model(**MODELS[name])
    return (
        model,
        layout_of(model),
        Calibration.of(tiny_batches(model, batches=4, sequences=sequences // 4, length=length), model),
    )


@pytest.mark.parametrize("name", ["llama-lm", "gpt2-lm"])
def test_logits_in_pieces_give_the_same_sensitivities(name, monkeypatch):
    model, layout, calibration = prepared(name)
    once = fisher.sensitivities(model, layout, calibration, quiet())
    monkeypatch.setattr(fisher, "LOGITS", 2 * 16 * model.config.vocab_size)
    assert [len(mask) for mask in fisher.sampled(model, calibration)[0].token_masks][:2] == [2, 2]
    pieces = fisher.sensitivities(model, layout, calibration, quiet())
    for site in layout.sites:
        torch.testing.assert_close(pieces[site.name].fisher, once[site.name].fisher, rtol=1e-3, atol=1e-7)
        assert pieces[site.name].outputs == once[site.name].outputs


@pytest.mark.parametrize("name", ["llama-lm", "gpt2-lm"])
def test_only_the_positions_that_are_drawn_are_projected(name):
    model, _, calibration = prepared(name)
    whole, few = (outputs_of(model, calibration, 0, every=every)[0] for every in (1, 4))
    mask = calibration.token_masks[0]
    chosen = drawn(torch.arange(mask.shape[1])[None], 4)[0]
    assert chosen.tolist() == [3, 7, 11, 15]
    at = torch.zeros_like(mask).index_fill_(1, chosen, True)[mask]
    torch.testing.assert_close(few.rows, whole.rows[at])


@pytest.mark.parametrize("name", ["bert", "bert-classifier", "llama-lm"])
def test_a_sample_estimates_the_whole(name, monkeypatch):
    """Sensitivities and curves of half of the data are those of all of it but for chance, and come at half of the tokens."""
    model, layout, calibration = prepared(name, sequences=512)
    monkeypatch.setattr(fisher, "OUTPUTS", calibration.tokens)
    everything = fisher.sensitivities(model, layout, calibration, quiet())
    for constant in ("TOKENS", "OUTPUTS"):
        monkeypatch.setattr(fisher, constant, calibration.tokens // 2)
    monkeypatch.setattr(fisher, "SEQUENCES", 1)
    assert fisher.sampled(model, calibration)[0].tokens == pytest.approx(calibration.tokens / 2, rel=0.1)
    half = fisher.sensitivities(model, layout, calibration, quiet())
    for site in layout.sites:
        one, other = half[site.name], everything[site.name]
        assert float(one.fisher.trace()) == pytest.approx(float(other.fisher.trace()), rel=0.2)
        assert one.coherence == pytest.approx(other.coherence, rel=0.2)
        assert one.outputs < 0.6 * other.outputs


def test_where_sequences_have_one_output_enough_of_them_are_read(monkeypatch):
    """Their number is that of the gradients; long texts would be few among so many tokens."""
    model, _, calibration = prepared("bert", sequences=128)
    monkeypatch.setattr(fisher, "TOKENS", 100)
    monkeypatch.setattr(fisher, "SEQUENCES", 64)
    assert fisher.sampled(model, calibration)[0].sequences == pytest.approx(64, abs=2)
    monkeypatch.setattr(fisher, "SEQUENCES", 1)
    assert fisher.sampled(model, calibration)[0].sequences < 16


def test_long_sequences_are_thinned_and_not_few(monkeypatch):
    """Where a few long texts would have outputs enough, more of them are read, and only some positions of each are drawn."""
    model, _, calibration = prepared("llama-lm")
    monkeypatch.setattr(fisher, "OUTPUTS", 32)
    part, every = fisher.sampled(model, calibration)
    assert part.sequences == pytest.approx(fisher.TEXTS, abs=2)
    assert every == max(part.tokens // 32, 1) > 1


def test_curves_read_rows_enough_for_their_channels(monkeypatch):
    model, layout, calibration = prepared("bert")
    monkeypatch.setattr(error_curves, "TOKENS", 1)
    seen = []
    walk = error_curves.walk_blocks

    def recording(model, layout, calibration, *args, **kwargs):
        seen.append(calibration.tokens)
        return walk(model, layout, calibration, *args, **kwargs)

    monkeypatch.setattr(error_curves, "walk_blocks", recording)
    error_curves.error_curves(model, layout, calibration, quiet())
    widest = max(site.units * site.consumer.width for site in layout.sites)
    assert seen == [pytest.approx(min(error_curves.ROWS * widest, calibration.tokens), rel=0.1)]
