"""From what a user brings to checked batches, kept tokens and folds."""

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import liar
from liar.batches import FOLDS, PIECE, PIECES, Calibration
from liar.testing import tiny_batches, tiny_model

BERT, LLAMA = tiny_model("bert"), tiny_model("llama", head="causal-lm")


def test_forms_of_batches_are_the_same():
    """A tensor, a mapping, a list of them, a generator, a DataLoader, Hugging Face's own mapping."""
    batches = tiny_batches(BERT, padding=None)
    ids = [batch["input_ids"] for batch in batches]
    rows = [{"input_ids": row} for tensor in ids for row in tensor]
    forms = [
        batches,
        ids,
        iter(batches),
        torch.utils.data.DataLoader(rows, batch_size=8),
        DataLoader(
            datasets.Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows]).with_format("torch"), 8
        ),
    ]
    found = [Calibration.of(form, BERT) for form in forms]
    for one in found:
        assert (one.tokens, one.sequences) == (4 * 8 * 12, 32)
        for batch, keep, fold, tensor in zip(one.batches, one.keep, one.folds, ids, strict=True):
            assert torch.equal(batch["input_ids"], tensor)
            assert bool(keep.all())
            assert torch.equal(fold, found[0].folds[0])


@pytest.mark.parametrize("form", [lambda b: b, lambda b: b["input_ids"]])
def test_a_single_batch_need_not_be_in_a_list(form):
    batch = tiny_batches(BERT, batches=1, padding=None)[0]
    assert Calibration.of(form(batch), BERT).sequences == 8


def test_labels_and_other_columns_are_dropped():
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
    found = Calibration.of([{"inputs_embeds": embeds}], BERT)
    assert (found.tokens, found.sequences) == (36, 4)
    assert liar.prune(tiny_model("bert"), [{"inputs_embeds": embeds}], keep=0.5, progress=False).tokens == 36


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_kept_tokens_are_those_of_the_mask(padding, dtype):
    batches = [{**batch, "attention_mask": batch["attention_mask"].to(dtype)} for batch in tiny_batches(BERT, padding=padding)]
    found = Calibration.of(batches, BERT)
    assert found.tokens == sum(int(batch["attention_mask"].sum()) for batch in batches)
    for batch, keep, folds in zip(batches, found.keep, found.folds, strict=True):
        assert torch.equal(keep, batch["attention_mask"].bool())
        assert len(folds) == int(keep.sum())


# Folds


def test_short_sequences_belong_to_one_fold_each():
    batches = tiny_batches(BERT)
    found = Calibration.of(batches, BERT)
    number = 0
    for keep, folds in zip(found.keep, found.folds, strict=True):
        for row in keep:
            one, folds = folds[: int(row.sum())], folds[int(row.sum()) :]
            assert one.unique().tolist() == [number % FOLDS]
            number += 1
        assert not len(folds)


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_folds_do_not_depend_on_batching(sizes):
    ids = torch.arange(sum(sizes) * 5).view(-1, 5) % 96
    parts = torch.cat(Calibration.of(list(ids.split(sizes)), BERT).folds)
    assert torch.equal(parts, Calibration.of([ids], BERT).folds[0])


def test_a_long_sequence_is_dealt_out_in_pieces():
    model = tiny_model("llama", max_position_embeddings=8192)
    folds = Calibration.of([torch.ones(1, PIECES * PIECE + 10, dtype=torch.int64)], model).folds[0]
    pieces = [piece.unique().tolist() for piece in folds.split(PIECE)]
    assert pieces == [[0], [1], [2], [3]] * 4 + [[0]]


@pytest.mark.parametrize("length", [4, 16, 40, 300])
def test_one_short_sequence_is_dealt_out_too(length):
    """However little there is, something can be held out."""
    model = tiny_model("llama", max_position_embeddings=2048)
    folds = Calibration.of([torch.ones(1, length, dtype=torch.int64)], model).folds[0]
    assert folds.unique().tolist() == [0, 1, 2, 3]
    sizes = torch.bincount(folds)
    assert sizes.max() - sizes.min() <= max(length // PIECES, 1)
