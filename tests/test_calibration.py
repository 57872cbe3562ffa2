"""From texts to padded batches."""

import copy
import gzip
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import liar
from liar.data import Calibration
from liar.data.texts import texts as read_texts
from liar.data.tokenise import DOCUMENT, SHORTEST
from liar.errors import CalibrationError, OptionError
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
    texts = [f"w{number % 80} w{number // 80} " + "w1 " * 68 for number in range(900)]
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
    texts = [f"w{number} " * (DOCUMENT - 2 - short) for number in range(8)]
    rows = real_ids(liar.calibration(texts, tokenizer, max_length=512))
    assert {len(tokenizer(text)["input_ids"]) for text in texts} == {DOCUMENT - short}
    assert (len(rows) == 8) is short


def test_a_text_that_comes_again_is_cut_as_the_first_time(tokenizer):
    """So that it is known again: other lengths would hide that it is a copy."""
    text, other = (" ".join(f"w{(step * number) % 80}" for number in range(300)) for step in (1, 7))
    once = real_ids(liar.calibration([text, other], tokenizer, max_length=64))
    thrice = real_ids(liar.calibration([text, other, text, text], tokenizer, max_length=64))
    assert {tuple(row) for row in thrice} == {tuple(row) for row in once}


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
        ([None, "", ("", None)], "got none"),
        (["  ", "\n", ("\t", None)], "got none"),
        ([("a", "b", "c")], "text 0: expected a string or a pair"),
        ([("a", 3)], "text 0: expected a string or a pair"),
        ([{"label": 1, "body": "w1"}], "text 0: .*a row with text or messages, got one with label, body"),
        ({"text": ["w1"]}, "expected many texts .*got one dict; choose one split of it"),
        (5, "got one int"),
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


# --- what users bring ---


def fast(vocabulary, **names):
    made = Tokenizer(WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token=vocabulary[0]))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token=vocabulary[0], **names)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("mixed_lengths", [True, False])
def test_the_tokenizer_is_as_it_was(tokenizer, pack, mixed_lengths):
    """Calling a fast tokenizer sets its truncation and padding, which its `save_pretrained` writes."""
    own = copy.deepcopy(tokenizer)
    own.backend_tokenizer.enable_truncation(max_length=77)
    own.backend_tokenizer.enable_padding(length=9)
    before = own.backend_tokenizer.to_str()
    liar.calibration(
        ["w1 " * 300, ("w2 " * 300, "w3 " * 300), "w4"], own, max_length=20, pack=pack, mixed_lengths=mixed_lengths
    )
    assert own.backend_tokenizer.to_str() == before


def test_what_has_no_token_is_passed_over():
    tokenizer = fast(["[UNK]", "hello", "world"])
    for texts in (["hello world", "   ", "world"], ["   ", "hello world", "\t\n", "world"], ["", None, "hello world", "world"]):
        batches = liar.calibration(texts, tokenizer)
        assert real_ids(batches) == [[2], [1, 2]]
        assert {value.dtype for batch in batches for value in batch.values()} == {torch.int64}
    with pytest.raises(CalibrationError, match="got none"):
        liar.calibration(["   ", "\n"], tokenizer)


def test_rows_of_a_dataset(tokenizer):
    rows = [{"text": text, "label": number} for number, text in enumerate([*TEXTS, None, ""])]
    expected = real_ids(liar.calibration(TEXTS, tokenizer))
    assert real_ids(liar.calibration(datasets.Dataset.from_list(rows), tokenizer)) == expected
    assert real_ids(liar.calibration(rows, tokenizer)) == expected
    assert real_ids(liar.calibration(datasets.Dataset.from_list(rows)["text"], tokenizer)) == expected
    with pytest.raises(CalibrationError, match="got one DatasetDict; choose one split of it"):
        liar.calibration(datasets.DatasetDict(train=datasets.Dataset.from_list(rows)), tokenizer)


def test_chats_go_through_the_chat_template():
    words = ["[UNK]", "<user>", "<bot>", "hello", "world", "[CLS]"]
    tokenizer = fast(words, cls_token="[CLS]")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 5)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<bot>"]})
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    chat = [{"role": "user", "content": "hello world"}, {"role": "bot", "content": "world"}]
    for texts in ([chat], [{"messages": chat}], datasets.Dataset.from_list([{"messages": chat}])):
        # The template has written what frames the text: no second [CLS].
        assert real_ids(liar.calibration(texts, tokenizer)) == [[1, 3, 4, 2, 4]]
    assert real_ids(liar.calibration(["hello"], tokenizer)) == [[5, 3]]


def test_chats_without_a_template(tokenizer):
    with pytest.raises(CalibrationError, match="text 1: the tokenizer cannot join these messages"):
        liar.calibration(["w1", [{"role": "user", "content": "w1"}]], tokenizer)


@pytest.mark.parametrize("tokenizer_given", [None, "bert-base-uncased", 5, ()])
def test_what_is_no_tokenizer(tokenizer_given):
    with pytest.raises(CalibrationError, match="tokenizer: expected a Hugging Face tokenizer, got a"):
        liar.calibration(TEXTS, tokenizer_given)


def test_arguments_in_the_wrong_order(tokenizer):
    with pytest.raises(CalibrationError, match="tokenizer: expected a Hugging Face tokenizer, got a list"):
        liar.calibration(tokenizer, TEXTS)


@pytest.mark.parametrize("length", [1, 2])
def test_a_length_without_room(tokenizer, length):
    with pytest.raises(OptionError, match=f"max_length={length}: expected more than the 2 special tokens"):
        liar.calibration(TEXTS, tokenizer, max_length=length)


@pytest.mark.parametrize("length", [0, -1, 10**10, 10**400, 1.5, True, "5"])
@pytest.mark.parametrize("pack", [True, False])
def test_lengths_that_are_none(tokenizer, length, pack):
    with pytest.raises(OptionError, match=r"max_length=.*expected a whole number, at least 1"):
        liar.calibration(TEXTS, tokenizer, max_length=length, pack=pack)


def test_texts_that_a_tokenizer_cannot_read(tokenizer):
    with pytest.raises(CalibrationError, match="text 1: the tokenizer cannot read it"):
        liar.calibration(["w1", "a\ud800"], tokenizer)


@given(left=st.integers(1, 400), right=st.integers(1, 400), length=st.integers(4, 40))
def test_long_pairs_are_cut_as_the_tokenizer_cuts_them(tokenizer, left, right, length):
    """Their ends are taken off first, since cutting a pair takes memory with the square of its length."""
    pair = (" ".join(f"w{n % 80}" for n in range(left)), " ".join(f"w{79 - n % 80}" for n in range(right)))
    found = real_ids(liar.calibration([pair], tokenizer, max_length=length))[0]
    expected = tokenizer(*pair, truncation=True, max_length=length)["input_ids"]
    assert len(found) == len(expected)
    # Where both are longer than there is room, the tokenizer decides by their full lengths which one keeps the odd token.
    assert found == expected or min(left, right) > length


def test_fewer_tokens_than_asked_for_are_said(tokenizer, caplog):
    liar.calibration(TEXTS, tokenizer, tokens=1000)
    assert "asked for 1000 calibration tokens, the texts give 19" in caplog.text
    caplog.clear()
    liar.calibration(TEXTS, tokenizer, tokens=10)
    assert not caplog.text


@pytest.mark.parametrize(
    "name", ["texts[1].txt", "a*b?.txt", "x::y.txt", "http: z.txt", "{a,b}.txt", "d[ir]/t.txt", "~t.txt", "a.b.txt", "é ü.txt"]
)
def test_the_file_that_was_named_is_read(name, tmp_path, monkeypatch):
    """However its name would be read as a pattern or an address, and whatever lies beside it."""
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(exist_ok=True)
    for other in ("texts1.txt", "aXbY.txt", "y.txt", "a.txt", "b.txt", "di/t.txt"):
        Path(other).parent.mkdir(exist_ok=True)
        Path(other).write_text("wrong\n" * 5)
    Path(name).write_text("right\n" * 60)
    assert list(read_texts(name)) == ["right"] * 60
    with gzip.open(f"{name}.gz", "wt") as file:
        file.write("packed\n" * 3)
    assert list(read_texts(f"{name}.gz")) == ["packed"] * 3


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.json", "rows.parquet"])
def test_missing_cells_are_passed_over(name, tmp_path, tokenizer):
    rows = datasets.Dataset.from_list([{"text": None if n == 5 else f"w{n}", "id": n} for n in range(10)])
    save = {"parquet": rows.to_parquet, "csv": rows.to_csv}.get(name.partition(".")[2], rows.to_json)
    save(tmp_path / name)
    assert sum(map(len, real_ids(liar.calibration(read_texts(str(tmp_path / name)), tokenizer)))) == 9 * 3
