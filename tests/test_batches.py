"""From what a user brings to checked batches, real tokens and folds."""

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import liar
from liar.data import FOLDS, Calibration
from liar.data.batches import PIECE, PIECES
from liar.errors import CalibrationError
from liar.testing import tiny_batches, tiny_model

BERT, LLAMA = tiny_model("bert"), tiny_model("llama", head="causal-lm")


def test_formats_of_batches_are_the_same():
    """A tensor, a mapping, a list of them, a generator, a DataLoader, Hugging Face's own mapping."""
    batches = tiny_batches(BERT, padding=None)
    ids = [batch["input_ids"] for batch in batches]
    rows = [{"input_ids": row} for tensor in ids for row in tensor]
    formats = [
        batches,
        ids,
        iter(batches),
        torch.utils.data.DataLoader(rows, batch_size=8),
        DataLoader(
            datasets.Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows]).with_format("torch"), 8
        ),
    ]
    for data in formats:
        calibration = Calibration.of(data, BERT)
        assert (calibration.tokens, calibration.sequences) == (4 * 8 * 12, 32)
        columns = calibration.batches, calibration.token_masks, calibration.folds, ids
        for batch, token_mask, fold, tensor in zip(*columns, strict=True):
            assert torch.equal(batch["input_ids"], tensor)
            assert bool(token_mask.all())
            # Eight sequences of one piece each.
            assert fold.tolist() == [sequence % FOLDS for sequence in range(8) for _ in range(12)]


@pytest.mark.parametrize("entry", [lambda b: b, lambda b: b["input_ids"]], ids=["mapping", "tensor"])
def test_a_single_batch_need_not_be_in_a_list(entry):
    batch = tiny_batches(BERT, batches=1, padding=None)[0]
    assert Calibration.of(entry(batch), BERT).sequences == 8
    for verb in (liar.prune, lambda model, data, keep, progress: liar.reconstruct(model, {"heads": [[0], [1]]}, data)):
        assert verb(tiny_model("bert"), entry(batch), keep=0.5, progress=False).sequences == 8


def test_labels_and_other_columns_are_not_passed_to_the_model():
    batch = {**tiny_batches(LLAMA)[0], "labels": torch.zeros(8, 12, dtype=torch.int64), "text": ["x"] * 8}
    taken = Calibration.of([batch], LLAMA).batches[0]
    assert set(taken) == {"input_ids", "attention_mask", "use_cache"}
    assert taken["use_cache"] is False


def test_the_users_batches_are_not_changed():
    batch = tiny_batches(LLAMA)[0]
    before = {name: value.clone() for name, value in batch.items()}
    liar.prune(tiny_model("llama"), [batch], keep=0.5, progress=False)
    assert batch.keys() == before.keys()
    assert all(torch.equal(batch[name], value) for name, value in before.items())


def test_embeddings_instead_of_ids():
    embeds = torch.randn(4, 9, 32, generator=torch.Generator().manual_seed(0))
    result = Calibration.of([{"inputs_embeds": embeds}], BERT)
    assert (result.tokens, result.sequences) == (36, 4)
    assert liar.prune(tiny_model("bert"), [{"inputs_embeds": embeds}], keep=0.5, progress=False).tokens == 36


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_real_tokens_are_those_of_the_attention_mask(padding, dtype):
    batches = [{**batch, "attention_mask": batch["attention_mask"].to(dtype)} for batch in tiny_batches(BERT, padding=padding)]
    result = Calibration.of(batches, BERT)
    assert result.tokens == sum(int(batch["attention_mask"].sum()) for batch in batches)
    for batch, token_mask, folds in zip(batches, result.token_masks, result.folds, strict=True):
        assert torch.equal(token_mask, batch["attention_mask"].bool())
        assert len(folds) == int(token_mask.sum())


# Folds


def test_short_sequences_belong_to_one_fold_each():
    batches = tiny_batches(BERT)
    result = Calibration.of(batches, BERT)
    number = 0
    for token_mask, folds in zip(result.token_masks, result.folds, strict=True):
        for row in token_mask:
            one, folds = folds[: int(row.sum())], folds[int(row.sum()) :]
            assert one.unique().tolist() == [number % FOLDS]
            number += 1
        assert not len(folds)


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_folds_and_numbers_do_not_depend_on_batching(sizes):
    ids = torch.arange(sum(sizes) * 5).view(-1, 5) % 96
    calibration = Calibration.of(list(ids.split(sizes)), BERT)
    assert torch.equal(torch.cat(calibration.folds), Calibration.of([ids], BERT).folds[0])
    assert list(calibration.starts) == [sum(sizes[:number]) for number in range(len(sizes))]


@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=6), processes=st.integers(2, 4))
def test_folds_do_not_depend_on_how_processes_share_the_data(sizes, processes):
    """Each process has some batches in a row, and knows which sequence is its first and how many tokens there are in all."""
    length = 40
    batches = list((torch.arange(sum(sizes) * length).view(-1, length) % 96).split(sizes))
    all_data = Calibration.of(batches, BERT)
    folds, starts, first = [], [], 0
    for number in range(processes):
        part = batches[number * len(batches) // processes : (number + 1) * len(batches) // processes]
        if part:
            own = Calibration.of(part, BERT, first_sequence=first, total_tokens=all_data.tokens)
            assert (own.first_sequence, own.starts[0]) == (first, first)
            folds += own.folds
            starts += own.starts
            first += own.sequences
    assert torch.equal(torch.cat(folds), torch.cat(all_data.folds))
    assert starts == list(all_data.starts)


def test_a_part_that_does_not_know_its_place_has_other_folds():
    """Negative control: the first sequence's number matters, and so does how many tokens there are in all."""
    ids = torch.arange(3 * 40).view(3, 40) % 96
    all_data = Calibration.of([ids], BERT)
    expected = all_data.folds[0][40:]
    right = {"first_sequence": 1, "total_tokens": 120}
    assert torch.equal(Calibration.of([ids[1:]], BERT, **right).folds[0], expected)
    for missing in right:
        given_alone = {name: value for name, value in right.items() if name != missing}
        assert not torch.equal(Calibration.of([ids[1:]], BERT, **given_alone).folds[0], expected)


def test_a_calibration_passes_through():
    calibration = Calibration.of(tiny_batches(BERT), BERT, first_sequence=7)
    assert Calibration.of(calibration, BERT) is calibration


@pytest.mark.parametrize("place", [{"first_sequence": 3}, {"total_tokens": 100}])
def test_a_calibration_cannot_be_numbered_anew(place):
    model = tiny_model("bert")
    calibration = Calibration.of(tiny_batches(model), model)
    with pytest.raises(CalibrationError, match="numbers are fixed: pass its batches"):
        Calibration.of(calibration, model, **place)


def test_a_long_sequence_is_split_into_pieces():
    model = tiny_model("llama", max_position_embeddings=8192)
    folds = Calibration.of([torch.ones(1, PIECES * PIECE + 10, dtype=torch.int64)], model).folds[0]
    pieces = [piece.unique().tolist() for piece in folds.split(PIECE)]
    assert pieces == [[0], [1], [2], [3]] * 4 + [[0]]


@pytest.mark.parametrize("length", [4, 16, 40, 300])
def test_one_short_sequence_is_split_too(length):
    """However little there is, something can be held out."""
    model = tiny_model("llama", max_position_embeddings=2048)
    folds = Calibration.of([torch.ones(1, length, dtype=torch.int64)], model).folds[0]
    assert folds.unique().tolist() == [0, 1, 2, 3]
    sizes = torch.bincount(folds)
    assert sizes.max() - sizes.min() <= max(length // PIECES, 1)
