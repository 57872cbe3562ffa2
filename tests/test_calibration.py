"""From texts to padded batches."""

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import liar
from liar.data import Calibration
from liar.data.tokenise import DOCUMENT, SHORTEST
from liar.errors import CalibrationError
from liar.testing import tiny_model

TEXTS = ["w1", "w2 w3 w4", "w5 w6", "w7 w8 w9 w10 w11"]


def real_ids(batches):
    """Sequences without their padding."""
    return [
        ids[mask.bool()].tolist()
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def tokens(batches):
    return sum(int(batch["attention_mask"].sum()) for batch in batches)


def test_texts_are_padded_on_the_right_and_sorted(tokenizer):
    batches = liar.calibration(TEXTS, tokenizer, batch_size=2)
    assert [list(batch) for batch in batches] == [["input_ids", "attention_mask", "token_type_ids"]] * 2
    assert sorted(real_ids(batches)) == sorted(tokenizer(text)["input_ids"] for text in TEXTS)
    lengths = [len(ids) for ids in real_ids(batches)]
    assert lengths == sorted(lengths)
    for batch in batches:
        mask = batch["attention_mask"]
        assert torch.equal(mask, mask.sort(1, descending=True).values)
        assert bool((batch["input_ids"][mask == 0] == tokenizer.pad_token_id).all())
        assert {value.dtype for value in batch.values()} == {torch.int64}
        assert mask.sum(1).max() == mask.shape[1]


def test_padding_uses_the_tokenizers_own_token(tokenizer):
    tokenizer.pad_token = "[UNK]"
    try:
        batch = liar.calibration(TEXTS, tokenizer)[0]
    finally:
        tokenizer.pad_token = "[PAD]"
    assert batch["input_ids"][batch["attention_mask"] == 0].unique().tolist() == [1]


def test_a_tokenizer_without_a_padding_token(plain_tokenizer):
    assert plain_tokenizer.pad_token_id is None
    batches = liar.calibration(TEXTS, plain_tokenizer)
    assert list(batches[0]) == ["input_ids", "attention_mask"]
    assert tokens(batches) == 1 + 3 + 2 + 5
    report = liar.prune(tiny_model("llama"), batches, keep=0.5, progress=False)
    assert report.tokens == 11


def test_pairs(tokenizer):
    batch = liar.calibration([("w1 w2", "w3"), ["w4", "w5"]], tokenizer)[0]
    assert real_ids([batch])[1] == tokenizer("w1 w2", "w3")["input_ids"]
    assert batch["token_type_ids"][1].tolist() == [0, 0, 0, 0, 1, 1]


def test_long_texts_are_cut(tokenizer):
    batches = liar.calibration(["w1 " * 50, "w2"], tokenizer, max_length=10, mixed_lengths=False)
    assert sorted(len(ids) for ids in real_ids(batches)) == [3, 10]


def test_long_texts_of_an_encoder_give_pieces_of_all_magnitudes(tokenizer):
    """As many from 8 to 16 tokens as from 16 to 32 or 32 to 64, and the same ones every time."""
    texts = ["w1 " * 70] * 900
    rows = real_ids(liar.calibration(texts, tokenizer, max_length=64, tokens=20_000))
    lengths = torch.tensor(sorted(map(len, rows)), dtype=torch.float64)
    assert lengths.unique().tolist()[-57:] == list(range(SHORTEST, 65))
    shares = torch.histc(lengths.log2(), bins=3, min=3, max=6) / len(rows)
    assert shares.tolist() == pytest.approx([1 / 3] * 3, abs=0.05)
    assert sum((row[0], row[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id) for row in rows) >= len(rows) - 1
    assert rows == real_ids(liar.calibration(texts, tokenizer, max_length=64, tokens=20_000))


@given(words=st.integers(40, 80), longest=st.integers(8, 40))
def test_pieces_of_a_text_are_what_it_would_give_whole(tokenizer, words, longest):
    """One after the other, all of one length but the last, and no more tokens than a text that is cut."""
    text = " ".join(f"w{number}" for number in range(words))
    rows = sorted(real_ids(liar.calibration([text], tokenizer, max_length=longest)), key=lambda row: row[1])
    inner = [token for row in rows for token in row[1:-1]]
    assert inner == tokenizer(text)["input_ids"][1:-1][: len(inner)]
    assert {len(row) for row in rows} == {len(rows[0])}
    assert longest - len(rows[0]) < tokens(liar.calibration([text], tokenizer, max_length=longest)) <= longest


def test_the_first_piece_of_every_text_comes_before_the_second_of_any(tokenizer):
    texts = [f"w{number} " + "w0 " * 60 for number in range(1, 40)]
    rows = real_ids(liar.calibration(texts, tokenizer, max_length=32))
    first = [row for row in rows if row[1] != tokenizer.convert_tokens_to_ids("w0")]
    assert len(first) == len(texts) < len(rows)
    assert real_ids(liar.calibration(texts, tokenizer, max_length=32, tokens=sum(map(len, first)))) == first


@pytest.mark.parametrize("longest", [3, SHORTEST])
def test_lengths_that_cannot_be_mixed(tokenizer, longest):
    texts = ["w1 " * 20, ("w1 " * 20, "w2 " * 20)] * 4
    rows = real_ids(liar.calibration(texts, tokenizer, max_length=longest, mixed_lengths=True))
    assert {len(row) for row in rows} == {longest}


LONG = "w1 " * 200


@pytest.mark.parametrize(
    ("texts", "options"),
    [
        (["w1 " * (DOCUMENT - 3)], {"max_length": 512}),
        (["w1 " * 5], {"max_length": 8}),
        ([(LONG, "w2")], {"max_length": 64}),
        ([LONG], {"max_length": 64, "pack": True}),
    ],
)
def test_short_texts_pairs_and_packed_sequences_are_not_taken_in_pieces(tokenizer, texts, options):
    result = [real_ids(liar.calibration(texts, tokenizer, mixed_lengths=mixed, **options)) for mixed in (True, False)]
    assert result[0] == result[1]


@pytest.mark.parametrize("short", [True, False])
def test_a_text_of_128_tokens_is_long(tokenizer, short):
    texts = ["w1 " * (DOCUMENT - 2 - short)] * 8
    rows = real_ids(liar.calibration(texts, tokenizer, max_length=512))
    assert {len(tokenizer(text)["input_ids"]) for text in texts} == {DOCUMENT - short}
    assert (len(rows) == 8) is short


def test_a_causal_models_texts_stay_whole(plain_tokenizer):
    """It reads the beginnings of every text anyway."""
    assert {len(row) for row in real_ids(liar.calibration([LONG] * 20, plain_tokenizer, max_length=64))} == {64}


def test_a_tokenizer_that_gives_no_pieces(tokenizer):
    """Some written in Python give what is left over as a flat list: the first piece is there all the same."""

    class Slow:
        cls_token, pad_token_id = "[CLS]", 0

        def __call__(self, text, truncation, max_length, return_overflowing_tokens=False):
            return dict(tokenizer(text, truncation=truncation, max_length=max_length))

    expected = {tuple(row) for row in real_ids(liar.calibration([LONG] * 9, tokenizer, max_length=64))}
    rows = real_ids(liar.calibration([LONG] * 9, Slow(), max_length=64))
    assert len(rows) == 9
    assert {tuple(row) for row in rows} <= expected


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batch_size(tokenizer, batch_size):
    batches = liar.calibration(["w1"] * 7, tokenizer, batch_size=batch_size)
    assert [len(batch["input_ids"]) for batch in batches] == [min(batch_size, 7 - start) for start in range(0, 7, batch_size)]


@pytest.mark.parametrize("pack", [False, True])
@given(budget=st.integers(1, 40))
def test_the_token_budget_is_exact(tokenizer, pack, budget):
    batches = liar.calibration(["w1 w2 w3"] * 20, tokenizer, tokens=budget, pack=pack, max_length=8)
    assert tokens(batches) == budget


def test_a_budget_larger_than_the_texts_takes_all(tokenizer):
    assert tokens(liar.calibration(TEXTS, tokenizer, tokens=10_000)) == tokens(liar.calibration(TEXTS, tokenizer))


def test_a_budget_reads_no_more_than_it_needs(plain_tokenizer):
    def endless():
        while True:
            yield "w1 w2 w3 w4"

    assert tokens(liar.calibration(endless(), plain_tokenizer, tokens=50)) == 50
    assert tokens(liar.calibration(endless(), plain_tokenizer, tokens=50, pack=True, max_length=16)) == 50


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=10))
def test_packing_joins_all_tokens_in_order(plain_tokenizer, lengths):
    """Nothing is lost, nothing padded but the last."""
    words = [f"w{number % 80}" for number in range(sum(lengths))]
    texts, start = [], 0
    for length in lengths:
        texts.append(" ".join(words[start : start + length]))
        start += length
    batches = liar.calibration(texts, plain_tokenizer, pack=True, max_length=8, batch_size=4)
    rows = real_ids(batches)
    full = [row for row in rows if len(row) == 8]
    rest = [row for row in rows if len(row) < 8]
    assert len(rest) == (len(words) % 8 > 0)
    expected = plain_tokenizer(" ".join(words))["input_ids"]
    assert [token for row in (*full, *rest) for token in row] == expected


def test_empty_texts_are_left_out(tokenizer):
    assert real_ids(liar.calibration(["", "w1", ""], tokenizer)) == [tokenizer("w1")["input_ids"]]


@pytest.mark.parametrize(
    "column", [lambda: datasets.Dataset.from_dict({"text": TEXTS})["text"], lambda: iter(TEXTS), lambda: tuple(TEXTS)]
)
def test_any_source_of_strings(tokenizer, column):
    assert real_ids(liar.calibration(column(), tokenizer)) == real_ids(liar.calibration(TEXTS, tokenizer))


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        ([], "expected at least one non-empty string, got none"),
        (iter([]), "got none"),
        (["", ""], "got none"),
        ("a text", "expected many texts .*got one str"),
        (b"a text", "got one bytes"),
        ([3], "text 0: expected a string or a pair of strings, got int"),
        (["w1", None], "text 1: expected a string or a pair of strings, got NoneType"),
        ([("a", "b", "c")], "text 0: expected a string or a pair"),
        ([("a", 3)], "text 0: expected a string or a pair"),
        ([{"text": "w1"}], "text 0: .*got dict"),
    ],
)
@pytest.mark.parametrize("pack", [True, False])
def test_what_is_no_text(tokenizer, texts, says, pack):
    with pytest.raises(CalibrationError, match=says):
        liar.calibration(texts, tokenizer, pack=pack)


def test_real_tokenizer_without_padding(stories_folder):
    from transformers import AutoTokenizer  # noqa: PLC0415 (only used here)

    tokenizer = AutoTokenizer.from_pretrained(stories_folder)
    batches = liar.calibration(["Once upon a time", "The little dog ran home."], tokenizer)
    assert batches[0]["input_ids"].shape[0] == 2
    assert Calibration.of(batches, tiny_model("llama", vocab_size=512)).tokens == tokens(batches)


def test_real_tokenizer_with_token_types(minilm_folder):
    from transformers import AutoTokenizer  # noqa: PLC0415 (only used here)

    tokenizer = AutoTokenizer.from_pretrained(minilm_folder)
    batch = liar.calibration([("A dog.", "A cat sleeps."), ("One.", "Two.")], tokenizer, max_length=8)[0]
    assert batch["input_ids"].shape[1] <= 8
    assert batch["token_type_ids"].max() == 1
