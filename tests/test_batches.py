"""From what a user brings to checked batches, real tokens and folds."""

import copy

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import BertForMultipleChoice, GPT2DoubleHeadsModel

import liar
from liar.data import FOLDS, Calibration
from liar.data.calibration_data import PIECE, PIECES
from liar.errors import CalibrationError
from liar.testing import tiny_batches, tiny_model

BERT, LLAMA = tiny_model("bert"), tiny_model("llama", head="causal-lm")


def distinct(sequences, length):
    """Random ids: sequences without copies among them."""
    return torch.randint(1, 96, (sequences, length), generator=torch.Generator().manual_seed(0))


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
    ids = distinct(sum(sizes), 5)
    calibration = Calibration.of(list(ids.split(sizes)), BERT)
    assert torch.equal(torch.cat(calibration.folds), Calibration.of([ids], BERT).folds[0])
    assert list(calibration.starts) == [sum(sizes[:number]) for number in range(len(sizes))]


@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=6), processes=st.integers(2, 4))
def test_folds_do_not_depend_on_how_processes_share_the_data(sizes, processes):
    """Each process has some batches in a row, and knows which sequence is its first and how many tokens there are in all."""
    length = 40
    batches = list(distinct(sum(sizes), length).split(sizes))
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
    ids = distinct(3, 40)
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
    folds = Calibration.of([distinct(1, PIECES * PIECE + 10)], model).folds[0]
    pieces = [piece.unique().tolist() for piece in folds.split(PIECE)]
    assert pieces == [[0], [1], [2], [3]] * 4 + [[0]]


@pytest.mark.parametrize("length", [4, 16, 40, 300])
def test_one_short_sequence_is_split_too(length):
    """However little there is, something can be held out."""
    model = tiny_model("llama", max_position_embeddings=2048)
    folds = Calibration.of([distinct(1, length)], model).folds[0]
    assert folds.unique().tolist() == [0, 1, 2, 3]
    sizes = torch.bincount(folds)
    assert sizes.max() - sizes.min() <= max(length // PIECES, 1)


# --- what users bring ---


def ids_and_mask(calibration):
    """Real tokens by sequence."""
    return [
        ids[mask].tolist()
        for batch, masks in zip(calibration.batches, calibration.token_masks, strict=True)
        for ids, mask in zip(batch["input_ids"], masks, strict=True)
    ]


@pytest.mark.parametrize("form", ["lists", "torch", "numpy", "dataset", "dataset with torch", "without masks"])
def test_rows_of_a_tokenised_dataset(form):
    """One sequence each, of different lengths: put together in batches, and as good as batches."""
    rows = [{"input_ids": list(range(1, 2 + n % 7)), "attention_mask": [1] * (1 + n % 7), "labels": n % 2} for n in range(70)]
    data = {
        "lists": rows,
        "torch": [{name: torch.tensor(value) for name, value in row.items()} for row in rows],
        "numpy": [{name: np.array(value) for name, value in row.items()} for row in rows],
        "dataset": datasets.Dataset.from_list(rows),
        "dataset with torch": datasets.Dataset.from_list(rows).with_format("torch"),
        "without masks": [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows],
    }[form]
    model = tiny_model("bert", head="sequence-classification")
    calibration = Calibration.of(data, model)
    assert ids_and_mask(calibration) == [row["input_ids"] for row in rows]
    assert [len(mask) for mask in calibration.token_masks] == [32, 32, 6]
    assert torch.cat(calibration.labels).tolist() == [row["labels"] for row in rows]
    assert liar.prune(model, data, keep=0.5, criterion="taylor", progress=False).sequences == 70


def test_rows_and_batches_may_be_mixed():
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.int64)}
    calibration = Calibration.of([{"input_ids": [1, 2]}, batch, {"input_ids": [3]}, {"input_ids": [4]}], BERT)
    assert ids_and_mask(calibration) == [[1, 2], [1, 1, 1], [1, 1, 1], [3], [4]]


def test_labels_of_tokens_are_padded_with_what_does_not_count():
    rows = [{"input_ids": [1, 2, 3], "labels": [4, 5, 6]}, {"input_ids": [7], "labels": [8]}]
    calibration = Calibration.of(rows, tiny_model("llama", head="causal-lm"))
    assert calibration.labels[0].tolist() == [[4, 5, 6], [8, -100, -100]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.int8])
def test_integers_of_any_size(dtype):
    batches = tiny_batches(BERT)
    calibration = Calibration.of([{**batch, "input_ids": batch["input_ids"].to(dtype)} for batch in batches], BERT)
    assert all(torch.equal(*pair) for pair in zip(
        [batch["input_ids"] for batch in calibration.batches], [batch["input_ids"] for batch in batches], strict=True
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": torch.ones(2, 3).bool()}, "expected integer ids, got torch.bool"),
        ({"input_ids": torch.ones(2, 3).to(torch.complex64)}, "expected integer ids, got torch.complex64"),
        ({"input_ids": torch.ones(2, 3, device="meta")}, "input_ids is on the meta device"),
        ({"input_ids": np.array([["a", "b"]])}, "expected input_ids, a tensor"),
        ({"input_ids": [[1, 2], [3]]}, "expected input_ids, a tensor"),
        ({"inputs_embeds": torch.ones(2, 3, 32, dtype=torch.int64)}, "expected inputs_embeds of a float type"),
        ({"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.tensor([[0.0, -1e9, 0.0]])}, "1 for real tokens"),
        ({"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.full((1, 2), torch.nan)}, "1 for real tokens"),
        ({"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.tensor([[1, 2]])}, "1 for real tokens"),
        ({None: 1, "": 2}, "expected input_ids"),
        ({0: 1, "x": 2}, "expected input_ids"),
        ({"input_ids": None}, "expected input_ids"),
    ],
)
def test_batches_that_are_none(batch, message):
    with pytest.raises(CalibrationError, match=message):
        Calibration.of([batch], BERT)


def test_nothing_in_place_of_ids_beside_embeddings():
    embeds = torch.randn(2, 3, 32)
    calibration = Calibration.of([{"input_ids": None, "inputs_embeds": embeds}], BERT)
    assert calibration.tokens == 6


@pytest.mark.parametrize("side", ["right", "left", "both"])
def test_padding_without_a_mask_is_no_text(side, caplog):
    model = tiny_model("bert")
    assert model.config.pad_token_id == 0
    ids = torch.randint(1, 96, (4, 10))
    real = torch.ones_like(ids, dtype=torch.bool)
    real[1, 7:] = side == "left"
    real[2, :3] = side == "right"
    ids[~real] = 0
    ids[3, 5] = 0  # inside a text: not padding
    found = Calibration.of([{"input_ids": ids}], model)
    assert torch.equal(found.token_masks[0], real)
    assert torch.equal(found.batches[0]["attention_mask"].bool(), real)
    padded = int((~real).any(1).sum())
    assert f"{padded} of its 4 sequences begin or end in the padding token (0)" in caplog.text
    mask = real.long()
    caplog.clear()
    with_mask = [copy.deepcopy(model), copy.deepcopy(model)]
    for each, batch in zip(with_mask, [{"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}], strict=True):
        liar.prune(each, [batch], keep=0.5, progress=False)
    assert all(torch.equal(*pair) for pair in zip(*(each.state_dict().values() for each in with_mask), strict=True))


@pytest.mark.parametrize("ends", [2, [3, 2]])
def test_padding_that_is_the_end_of_a_text_as_well_is_only_said(ends, caplog):
    model = tiny_model("llama", pad_token_id=2, eos_token_id=ends)
    ids = torch.randint(3, 96, (3, 6))
    ids[:, -1] = 2
    assert Calibration.of([ids], model).tokens == 18
    assert not caplog.text, "one end is a text's own"
    ids[0, -3:] = 2
    assert Calibration.of([ids], model).tokens == 18
    assert "1 of its" not in caplog.text
    assert "end in several tokens 2, which is the padding token as well as the end of a text" in caplog.text


def test_all_padding_is_text():
    """Nothing else could be meant."""
    assert Calibration.of([torch.zeros(2, 3, dtype=torch.int64)], BERT).tokens == 6


def test_iterating_a_loader_draws_no_random_number():
    loader = torch.utils.data.DataLoader(torch.randint(1, 96, (12, 5)), batch_size=4, shuffle=True)
    state = torch.get_rng_state()
    assert Calibration.of(loader, BERT).sequences == 12
    assert torch.equal(torch.get_rng_state(), state)


def test_a_forward_that_takes_anything():
    """As a decorator without `functools.wraps` leaves it."""
    model = tiny_model("bert")
    expected, kind = copy.deepcopy(model), type(model)
    batches = tiny_batches(model)
    liar.prune(expected, batches, keep=0.5, progress=False)

    class Anything(kind):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model.__class__ = Anything
    liar.prune(model, batches, keep=0.5, progress=False)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize("given", [None, 5, "bert-base-uncased", torch.nn.Linear(2, 2)])
def test_calibration_needs_a_model(given):
    with pytest.raises(liar.LiarError):
        Calibration.of(tiny_batches(BERT), given)


@pytest.mark.parametrize("shape", [(8, 3, 10), (8, 12)])
@pytest.mark.parametrize("criterion", ["reconstruction", "fisher", "fluctuation"])
def test_multiple_choice(shape, criterion):
    """Every choice is a sequence; sequences without choices are not taken for the choices of one question."""
    model = BertForMultipleChoice(tiny_model("bert").config)
    ids = torch.randint(1, 96, shape)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    calibration = Calibration.of([batch], model)
    assert calibration.sequences == ids[..., 0].numel()
    flat = {name: value.view(-1, shape[-1]) for name, value in batch.items()}
    masks = [liar.select(model, [each], keep=0.6, criterion=criterion, progress=False) for each in (batch, flat)]
    assert masks[0] == masks[1], "as many sequences, whatever they are choices of"
    report = liar.reconstruct(model, masks[0], [batch], progress=False)
    assert report.sequences == calibration.sequences
    assert model(**{name: value.view(-1, 2, shape[-1]) for name, value in flat.items()}).logits.shape[1] == 2


def test_several_labels_at_once():
    """`problem_type="multi_label_classification"`: each label by itself, so classes are no rivals."""
    model = tiny_model("bert", head="sequence-classification", problem_type="multi_label_classification", num_labels=4)
    batches = tiny_batches(model)
    assert liar.prune(copy.deepcopy(model), batches, keep=0.5, progress=False).achieved <= 0.5
    labels = torch.randint(0, 2, (len(batches[0]["input_ids"]), 4), generator=torch.Generator().manual_seed(0))
    labelled = [{**batch, "labels": labels} for batch in batches]
    own = copy.deepcopy(model).double()
    gradients = liar.collect(own, labelled, criteria=["taylor"], progress=False).sites
    site = liar.discover(own)["neurons.1"]
    gate = torch.ones(site.units, dtype=torch.float64, requires_grad=True)
    own.get_submodule(site.module).register_forward_pre_hook(lambda _, args: (args[0] * gate,))
    loss = sum(
        torch.nn.functional.binary_cross_entropy_with_logits(own(**batch).logits, labels.double(), reduction="sum")
        for batch in batches
    )
    torch.testing.assert_close(gradients["neurons.1"]["gradient"], torch.autograd.grad(loss, gate)[0])
    with pytest.raises(CalibrationError, match="expected 0 or 1 for every label"):
        liar.select(model, [{**batches[0], "labels": labels + 1}], keep=0.5, criterion="taylor", progress=False)
    with pytest.raises(CalibrationError, match="expected 0 or 1 for every label"):
        liar.select(model, [{**batches[0], "labels": labels[:, 0]}], keep=0.5, criterion="taylor", progress=False)


def test_padded_rows_are_as_good_as_padded_batches():
    rows = [[5, 6, 7, 0, 0, 0], [8, 9, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6]]
    by_row, by_batch = Calibration.of([{"input_ids": row} for row in rows], BERT), Calibration.of([torch.tensor(rows)], BERT)
    assert ids_and_mask(by_row) == ids_and_mask(by_batch) == [[5, 6, 7], [8, 9], [1, 2, 3, 4, 5, 6]]


def test_a_row_without_a_mask_takes_none_from_the_others():
    rows = [{"input_ids": [5, 6, 7, 8], "attention_mask": [1, 1, 0, 0]}, {"input_ids": [9, 9]}]
    assert ids_and_mask(Calibration.of(rows, BERT)) == [[5, 6], [9, 9]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"input_ids": np.array([1.7, 2.5])}], "expected integer ids, got torch.float64"),
        ([{"input_ids": torch.tensor([True, False])}], "expected integer ids, got torch.bool"),
        ([{"input_ids": [1, 2], "attention_mask": [1, 0.5]}], "1 for real tokens"),
        ([{"input_ids": [1, 2], "labels": "good"}], "expected labels as numbers"),
        ([{"input_ids": [1, 2], "labels": 1}, {"input_ids": [1, 2]}], "expected labels as numbers in every row or in none"),
        ([{"input_ids": [torch.tensor([1, 2]), torch.tensor([3, 4])]}], "got a list of tensors; torch's default collation"),
    ],
)
def test_rows_that_are_none(rows, message):
    with pytest.raises(CalibrationError, match=message):
        Calibration.of(rows, BERT)


def test_a_dataset_in_a_loader_is_not_read_transposed():
    """torch's default collation makes a list by position of what was a list by sequence."""
    rows = datasets.Dataset.from_list([{"input_ids": list(range(1, 7))} for _ in range(8)])
    with pytest.raises(CalibrationError, match=r"with_format\(\"torch\"\)"):
        Calibration.of(DataLoader(rows, batch_size=4), BERT)
    assert Calibration.of(DataLoader(rows.with_format("torch"), batch_size=4), BERT).sequences == 8


def test_several_labels_in_rows():
    model = tiny_model("bert", head="sequence-classification", problem_type="multi_label_classification", num_labels=3)
    rows = [{"input_ids": [1, 2, 3], "labels": [0.0, 1.0, 1.0]}, {"input_ids": [4, 5, 6], "labels": [1.0, 0.0, 0.0]}]
    assert Calibration.of(rows, model).labels[0].tolist() == [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]
    assert liar.select(model, rows, keep=0.5, criterion="taylor", progress=False)


@pytest.mark.parametrize(
    "place", [{"first_sequence": "a"}, {"first_sequence": -1}, {"total_tokens": 1.5}, {"total_tokens": True}]
)
def test_places_that_are_none(place):
    with pytest.raises(CalibrationError, match="expected a whole number of at least 0"):
        Calibration.of(tiny_batches(BERT), BERT, **place)


def test_two_heads_at_once():
    """One gives words, the other a number for every sequence."""
    model = GPT2DoubleHeadsModel(tiny_model("gpt2").config)
    assert liar.prune(model, tiny_batches(model), keep=0.6, progress=False).achieved <= 0.6
