"""Texts to padded batches: tokenised, cut, packed, sorted by length."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from liar.errors import CalibrationError
from liar.options import CalibrationOptions

# Texts of so many tokens are documents: where they are cut is free to choose.
DOCUMENT = 128
# Tokens of the shortest pieces of them.
SHORTEST = 8
# What a model reads, of what a tokenizer gives.
INPUTS = ("input_ids", "attention_mask", "token_type_ids")

Parts = tuple[str, ...]
Row = dict[str, Tensor]


def calibration(
    texts: Iterable[str | tuple[str, str]],
    tokenizer: Any,
    *,
    max_length: int = CalibrationOptions.max_length,
    batch_size: int = CalibrationOptions.batch_size,
    tokens: int | None = CalibrationOptions.tokens,
    pack: bool = CalibrationOptions.pack,
    mixed_lengths: bool = CalibrationOptions.mixed_lengths,
) -> list[dict[str, Tensor]]:
    """Tokenise texts into padded batches, sorted by length so that little is padded.

    Args:
        texts: strings or pairs of strings: a list, a generator, or a column of a `datasets` dataset.
        tokenizer: a Hugging Face tokenizer; it need not have a padding token.
        max_length: longer texts are cut to so many tokens.
        batch_size: sequences per batch.
        tokens: stop after so many tokens (the last sequence is cut); all texts otherwise.
        pack: join the texts and cut them into full sequences of `max_length`, as language models are trained.
        mixed_lengths: with an encoder's tokenizer (one that has a CLS token), take long texts in pieces, so that the repair is
            right for short inputs and for long ones: what attention heads give changes with the length. Texts of at least
            128 tokens (or `max_length`, if that is less) are long; each has its own length of piece, from 8 tokens to
            `max_length`, drawn evenly on a logarithmic scale and the same every time. The first piece of every text comes
            before the second of any, and of no text more than `max_length` tokens are taken. Pairs and packed sequences stay
            as they are.

    Returns:
        Batches with `input_ids`, `attention_mask` and, where the tokenizer makes them, `token_type_ids`, each
        int64 [sequences, length], padded on the right.

    Raises:
        CalibrationError: no text, or something that is not a text.
        OptionError: a length or count below 1.

    Example:
        >>> batches = calibration(["a text", "another one"], tokenizer)
        >>> batches[0]["input_ids"].shape
        torch.Size([2, 4])
    """
    CalibrationOptions(max_length, batch_size, tokens, pack, mixed_lengths).check()
    mixed_lengths = mixed_lengths and getattr(tokenizer, "cls_token", None) is not None
    many = _joined if pack else _in_pieces if mixed_lengths else _encoded
    rows = list(_cut(many(_checked(texts), tokenizer, max_length), tokens))
    if not rows:
        raise CalibrationError("no calibration text: expected at least one non-empty string, got none")
    rows.sort(key=lambda row: len(row["input_ids"]))
    padding = {"input_ids": getattr(tokenizer, "pad_token_id", None) or 0}
    return [
        {
            name: pad_sequence([row[name] for row in chunk], batch_first=True, padding_value=padding.get(name, 0))
            for name in chunk[0]
        }
        for chunk in (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))
    ]


def _checked(texts: Iterable[Any]) -> Iterator[Parts]:
    """Texts that are not empty, each as one or two strings."""
    if isinstance(texts, (str, bytes)):
        raise CalibrationError(f"expected many texts (a list of strings, a column), got one {type(texts).__name__}")
    for number, text in enumerate(texts):
        parts = (text,) if isinstance(text, str) else tuple(text) if isinstance(text, (tuple, list)) else ()
        if not 1 <= len(parts) <= 2 or not all(isinstance(part, str) for part in parts):
            raise CalibrationError(f"text {number}: expected a string or a pair of strings, got {type(text).__name__}")
        if any(parts):
            yield parts


def _encoded(texts: Iterable[Parts], tokenizer: Any, longest: int) -> Iterator[Row]:
    """Every text by itself."""
    for parts in texts:
        yield from _rows(tokenizer(*parts, truncation=True, max_length=longest))


def _in_pieces(texts: Iterable[Parts], tokenizer: Any, longest: int) -> Iterator[Row]:
    """Short texts and pairs as they are, then of long ones the first piece of each before the second of any."""
    lengths, later = _mixed_lengths(longest), []
    for parts in texts:
        [row] = _encoded([parts], tokenizer, longest)
        if len(parts) == 1 and len(row["input_ids"]) >= min(DOCUMENT, longest):
            length = next(lengths)
            pieces = tokenizer(*parts, truncation=True, max_length=length, return_overflowing_tokens=True)
            row, *rest = _rows(pieces, longest // length)
            later += rest
        yield row
    yield from later


def _mixed_lengths(longest: int) -> Iterator[int]:
    """Lengths that are spread evenly on a logarithmic scale."""
    generator, shortest = random.Random(0), min(SHORTEST, longest)
    while True:
        yield round(math.exp(generator.uniform(math.log(shortest), math.log(longest))))


def _joined(texts: Iterable[Parts], tokenizer: Any, length: int) -> Iterator[Row]:
    """All texts one after the other, in sequences of one length; the last may be shorter."""
    joined: list[int] = []
    for parts in texts:
        joined += tokenizer(*parts)["input_ids"]
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
    return [dict(zip(names, map(torch.tensor, values), strict=True)) for values in zip(*columns, strict=True)]


def _row(ids: list[int]) -> Row:
    row = torch.tensor(ids)
    return {"input_ids": row, "attention_mask": torch.ones_like(row)}


def _cut(rows: Iterator[Row], tokens: int | None) -> Iterator[Row]:
    left = tokens
    with tqdm(desc="tokenise", unit="tok", unit_scale=True, leave=False, total=tokens) as bar:
        for row in rows:
            if left is not None:
                row = {name: value[:left] for name, value in row.items()}
                left -= len(row["input_ids"])
            bar.update(len(row["input_ids"]))
            yield row
            if left is not None and left <= 0:
                return
