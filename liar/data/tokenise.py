"""Texts to padded batches: tokenised, cut, packed, sorted by length."""

from __future__ import annotations

import copy
import logging
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import length_hint
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from liar.errors import CalibrationError, OptionError
from liar.options import CalibrationOptions, is_iterable
from liar.progress import ProgressOption, progress_of

logger = logging.getLogger(__name__)

# Texts of so many tokens are documents: where they are cut is free to choose.
DOCUMENT = 128
# Tokens of the shortest pieces of them.
SHORTEST = 8
# What a model reads, of what a tokenizer gives.
INPUTS = ("input_ids", "attention_mask", "token_type_ids")

Row = dict[str, Tensor]


@dataclass(frozen=True)
class Text:
    """One text, or a pair.

    Attributes:
        number: its place in what the user gave.
        parts: one string or two.
        framed: whether the tokenizer adds its special tokens; a chat template has written its own.
    """

    number: int
    parts: tuple[str, ...]
    framed: bool = True


def calibration(
    texts: Iterable[Any],
    tokenizer: Any,
    *,
    max_length: int = CalibrationOptions.max_length,
    batch_size: int = CalibrationOptions.batch_size,
    tokens: int | None = CalibrationOptions.tokens,
    pack: bool = CalibrationOptions.pack,
    mixed_lengths: bool = CalibrationOptions.mixed_lengths,
    progress: ProgressOption = True,
) -> list[dict[str, Tensor]]:
    """Tokenise texts into padded batches, sorted by length so that little is padded.

    Args:
        texts: a list, a generator, or a `datasets` dataset, of strings, pairs of strings, chats (lists of messages with a
            `role` and a `content`, which the tokenizer's chat template joins), or rows with a `text` or `messages`. Entries
            that are None, blank, or without any token are skipped.
        tokenizer: a Hugging Face tokenizer; it need not have a padding token. It is not changed.
        max_length: longer texts are cut to this number of tokens.
        batch_size: sequences per batch.
        tokens: stop after this number of tokens (the last sequence is cut); None takes all texts.
        pack: join the texts and cut them into full sequences of `max_length`, as language models are trained.
        mixed_lengths: with an encoder's tokenizer (one that has a CLS token), take long texts in pieces, so that the repair
            suits short and long inputs: the output of attention heads depends on the length. Texts of at least
            128 tokens (or `max_length`, if that is less) are long; each has its own length of piece, from 8 tokens to
            `max_length`, drawn evenly on a logarithmic scale and the same every time. The first piece of every text comes
            before the second of any, and of no text more than `max_length` tokens are taken. Pairs and packed sequences stay
            as they are.
        progress: show a bar, or a function that is called in its place (see `ProgressUpdate`). Of texts without a length, such
            as a generator's, the end is not known: without `tokens` the share stays 0 until it is reached.

    Returns:
        Batches with `input_ids`, `attention_mask` and, where the tokenizer makes them, `token_type_ids`, each
        int64 [sequences, length], padded on the right.

    Raises:
        CalibrationError: no text, something that is not a text, or no tokenizer.
        OptionError: a length or count below 1, or a length that leaves no room beside the special tokens.

    Example:
        >>> batches = calibration(["a text", "another one"], tokenizer)
        >>> batches[0]["input_ids"].shape
        torch.Size([2, 4])
    """
    options = CalibrationOptions(max_length, batch_size, tokens, pack, mixed_lengths).checked()
    max_length, batch_size, tokens = options.max_length, options.batch_size, options.tokens
    # Calling a tokenizer with a longest length changes its state, which would be saved with it.
    tokenizer = copy.deepcopy(tokenizer)
    _check_tokenizer(tokenizer, max_length)
    mixed_lengths = mixed_lengths and getattr(tokenizer, "cls_token", None) is not None
    many = _joined if pack else _in_pieces if mixed_lengths else _encoded
    # What is counted: tokens if so many are asked for, otherwise texts.
    steps = tokens or length_hint(texts) or math.inf
    with (
        progress_of(progress, "calibration", {"tokenise": 1}) as shown,
        shown.stage("tokenise", steps) as advance,
    ):
        if tokens is None:
            rows = list(many(_checked(texts, tokenizer, advance), tokenizer, max_length))
        else:
            rows = list(_cut(many(_checked(texts, tokenizer), tokenizer, max_length), tokens, advance))
    if not rows:
        raise CalibrationError("no calibration text: expected at least one non-empty string, got none")
    given = sum(len(row["input_ids"]) for row in rows)
    if tokens is not None and given < tokens:
        logger.warning(
            "asked for %d calibration tokens, the texts give %d (of each text at most max_length=%d are taken): add texts%s",
            tokens, given, max_length, "" if pack else ", or take more of each",
        )  # fmt: skip
    rows.sort(key=lambda row: len(row["input_ids"]))
    padding = {"input_ids": getattr(tokenizer, "pad_token_id", None) or 0}
    return [
        {
            name: pad_sequence([row[name] for row in chunk], batch_first=True, padding_value=padding.get(name, 0))
            for name in chunk[0]
        }
        for chunk in (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))
    ]


def _check_tokenizer(tokenizer: Any, longest: int) -> None:
    if not callable(tokenizer):
        raise CalibrationError(f"tokenizer: expected a Hugging Face tokenizer, got a {type(tokenizer).__name__}")
    count = getattr(tokenizer, "num_special_tokens_to_add", lambda: 0)()
    if longest <= count:
        raise OptionError(f"max_length={longest}: expected more than the {count} special tokens around every text")


def _checked(texts: Iterable[Any], tokenizer: Any, advance: Callable[[int], Any] = lambda _: None) -> Iterator[Text]:
    """The texts that are not empty; `advance` is called after every text."""
    if isinstance(texts, (str, bytes, Mapping)) or not is_iterable(texts):
        more = "; choose one split of it" if isinstance(texts, Mapping) else ""
        raise CalibrationError(f"expected many texts (a list of strings, a column), got one {type(texts).__name__}{more}")
    for number, given in enumerate(texts):
        text = _as_text(given, number, tokenizer)
        if any(part.strip() for part in text.parts):
            yield text
        advance(1)


def _as_text(given: Any, number: int, tokenizer: Any) -> Text:
    if isinstance(given, Mapping):
        name = next((name for name in ("messages", "text") if name in given), None)
        if name is None:
            raise CalibrationError(
                f"text {number}: expected a string, or a row with text or messages, got one with {', '.join(map(str, given))}; "
                "pass the column that holds the texts"
            )
        return _as_text(given[name], number, tokenizer)
    parts = (given,) if isinstance(given, str) or given is None else tuple(given) if isinstance(given, (tuple, list)) else (0,)
    if parts and all(isinstance(part, Mapping) and {"role", "content"} <= part.keys() for part in parts):
        try:
            return Text(number, (tokenizer.apply_chat_template(list(parts), tokenize=False),), framed=False)
        except Exception as error:  # no template, or one that refuses these roles
            raise CalibrationError(f"text {number}: the tokenizer cannot join these messages: {error}") from error
    parts = tuple(part for part in parts if part is not None)
    if len(parts) > 2 or not all(isinstance(part, str) for part in parts):
        raise CalibrationError(
            f"text {number}: expected a string or a pair of strings, got {type(given).__name__}; "
            "pass the column that holds the texts"
        )
    return Text(number, parts)


def _tokenised(text: Text, tokenizer: Any, **how: Any) -> Any:
    try:
        parts = text.parts
        if len(parts) == 2 and getattr(tokenizer, "is_fast", False):
            # Cutting a pair takes memory with the square of its length.
            parts = tuple(_beginning(part, tokenizer, 2 * how.get("max_length", len(part) + 1)) for part in parts)
        return tokenizer(*parts, **how, **({} if text.framed else {"add_special_tokens": False}))
    except Exception as error:  # tokenizers raise whatever they raise
        raise CalibrationError(f"text {text.number}: the tokenizer cannot read it ({type(error).__name__}): {error}") from error


def _beginning(part: str, tokenizer: Any, tokens: int) -> str:
    """A text without most of what is beyond its first tokens."""
    if len(part) <= tokens:
        return part
    how = {"add_special_tokens": False, "truncation": True, "max_length": tokens, "return_offsets_mapping": True}
    return part[: max((end for _, end in tokenizer(part, **how)["offset_mapping"]), default=0)]


def _encoded(texts: Iterable[Text], tokenizer: Any, longest: int) -> Iterator[Row]:
    """Every text by itself."""
    for text in texts:
        yield from _rows(_tokenised(text, tokenizer, truncation=True, max_length=longest))


def _in_pieces(texts: Iterable[Text], tokenizer: Any, longest: int) -> Iterator[Row]:
    """Short texts and pairs as they are, then of long ones the first piece of each before the second of any."""
    drawn, later = _mixed_lengths(longest), list[Row]()
    # A text that comes again is cut as the first time, so that it is known again.
    lengths: defaultdict[tuple[str, ...], int] = defaultdict(lambda: next(drawn))
    for text in texts:
        rows = list(_encoded([text], tokenizer, longest))
        if len(text.parts) == 1 and rows and len(rows[0]["input_ids"]) >= min(DOCUMENT, longest):
            length = lengths[text.parts]
            pieces = _tokenised(text, tokenizer, truncation=True, max_length=length, return_overflowing_tokens=True)
            rows = _rows(pieces, longest // length)
        yield from rows[:1]
        later += rows[1:]
    yield from later


def _mixed_lengths(longest: int) -> Iterator[int]:
    """Lengths that are spread evenly on a logarithmic scale."""
    generator, shortest = random.Random(0), min(SHORTEST, longest)
    while True:
        yield round(math.exp(generator.uniform(math.log(shortest), math.log(longest))))


def _joined(texts: Iterable[Text], tokenizer: Any, length: int) -> Iterator[Row]:
    """All texts one after the other, in sequences of one length; the last may be shorter."""
    joined: list[int] = []
    for text in texts:
        joined += _tokenised(text, tokenizer)["input_ids"]
        while len(joined) >= length:
            yield _row(joined[:length])
            joined = joined[length:]
    if joined:
        yield _row(joined)


def _rows(encoded: Mapping[str, Any], most: int = 1) -> list[Row]:
    """The sequences of one text: a single one, or at most so many where its pieces were asked for."""
    names = [name for name in INPUTS if name in encoded]
    several = any(isinstance(ids, list) for ids in encoded["input_ids"][:1])
    columns = [encoded[name][:most] if several else [encoded[name]] for name in names]
    rows = [
        {name: torch.tensor(value, dtype=torch.int64) for name, value in zip(names, values, strict=True)}
        for values in zip(*columns, strict=True)
    ]
    return [row for row in rows if len(row["input_ids"])]


def _row(ids: list[int]) -> Row:
    row = torch.tensor(ids)
    return {"input_ids": row, "attention_mask": torch.ones_like(row)}


def _cut(rows: Iterator[Row], tokens: int, advance: Callable[[int], Any]) -> Iterator[Row]:
    """The first rows with so many tokens, the last of them cut; `advance` is called with the tokens of each."""
    left = tokens
    for row in rows:
        row = {name: value[:left] for name, value in row.items()}
        left -= len(row["input_ids"])
        advance(len(row["input_ids"]))
        yield row
        if left <= 0:
            return
