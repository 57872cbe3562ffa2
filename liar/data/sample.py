"""A part of the calibration data: for estimates that more data would hardly change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from liar.data.batches import Batch
from liar.data.calibration_data import Calibration

# Multiples of them, modulo 1, are spread evenly, whatever period the data has (Weyl's theorem): of the golden ratio for
# sequences, and of the root of two for positions, since sums of both must be, too.
STEP = 0.6180339887498949
POSITION_STEP = 0.4142135623730950


def take(calibration: Calibration, pieces: Sequence[tuple[int, Tensor]]) -> Calibration:
    """Some sequences in new batches.

    Args:
        calibration: the whole.
        pieces: for every new batch the number of an old one, and which of its rows, int64.
    """
    batches, masks, folds, labels, numbers = [], [], [], [], []
    for number, rows in pieces:
        whole = calibration.token_masks[number]
        rows = rows.to(whole.device)
        taken = torch.zeros(len(whole), dtype=torch.bool, device=whole.device).index_fill_(0, rows, True)
        batches.append(dict(_taken(calibration.batches[number], rows, len(whole))))
        masks.append(whole[rows])
        folds.append(calibration.folds[number][taken[whole.nonzero()[:, 0]]])
        label = calibration.labels[number]
        labels.append(label[rows] if _has_rows(label, len(whole)) else label)
        numbers.append(calibration.numbers[number])
    return replace(
        calibration,
        encoder=None if calibration.encoder is None else take(calibration.encoder, pieces),
        batches=tuple(batches),
        token_masks=tuple(masks),
        folds=tuple(folds),
        labels=tuple(labels),
        numbers=tuple(numbers),
        tokens=sum(int(mask.sum()) for mask in masks),
        sequences=sum(len(mask) for mask in masks),
    )


def take_batches(calibration: Calibration, numbers: range) -> Calibration:
    """Some batches that follow each other, as a part of the whole: their sequences keep their global numbers.

    `tokens`, `distinct_tokens` and `sequences` stay those of the whole. There may be no batch at all.

    Args:
        calibration: the whole.
        numbers: of the batches, ascending by 1.
    """
    part = slice(numbers.start, numbers.stop)
    return replace(
        calibration,
        encoder=None if calibration.encoder is None else take_batches(calibration.encoder, numbers),
        batches=calibration.batches[part],
        token_masks=calibration.token_masks[part],
        folds=calibration.folds[part],
        labels=calibration.labels[part],
        numbers=calibration.numbers[part],
        first_sequence=calibration.starts[numbers.start] if numbers else calibration.first_sequence,
    )


def sample(calibration: Calibration, tokens: int, *, sequences: int = 1) -> Calibration:
    """Whole sequences with about so many tokens, spread evenly over the data; all of it where there are no more.

    Which sequences these are follows from their numbers alone, not from how they are batched.

    Args:
        calibration: the whole.
        tokens: about how many to take.
        sequences: about how many to take at least.
    """
    share = max(tokens / calibration.tokens, sequences / calibration.sequences)
    if share >= 1:
        return calibration
    chosen = []
    for start, mask in zip(calibration.starts, calibration.token_masks, strict=True):
        numbers = torch.arange(start, start + len(mask), dtype=torch.float64)
        chosen.append(((numbers * STEP) % 1 < share).nonzero().squeeze(1))
    part = take(calibration, [(number, rows) for number, rows in enumerate(chosen) if len(rows)])
    return part if part.tokens else calibration


def sample_tokens(calibration: Calibration, number: int, share: float) -> Tensor:
    """About such a share of the real tokens of a batch, spread evenly over sequences and positions: bool [sequences, length].

    Which tokens these are follows from their places in their sequences and the sequences' numbers alone.
    """
    mask, start = calibration.token_masks[number], calibration.starts[number]
    if share >= 1:
        return mask
    sequence = torch.arange(start, start + len(mask), dtype=torch.float64, device=mask.device)
    place = (mask.cumsum(1) - 1) * POSITION_STEP + (sequence * STEP)[:, None]
    return mask & (place % 1 < share)


def evenly(total: int, count: int) -> Tensor:
    """So many of the numbers below `total`, evenly spaced, all if there are no more: int64, ascending."""
    return torch.arange(total) if count >= total else (2 * torch.arange(count) + 1) * total // (2 * count)


def spread(calibration: Calibration, count: int, among: Tensor | None = None) -> Tensor:
    """Which sequences to take where so many are to be: bool [sequences], spread evenly over the data, all if there are no more.

    Args:
        calibration: the whole.
        count: how many to take.
        among: bool [sequences], those that may be taken; None: all.
    """
    places = torch.arange(calibration.sequences) if among is None else among.nonzero().squeeze(1)
    chosen = places[evenly(len(places), count)]
    return torch.zeros(calibration.sequences, dtype=torch.bool).index_fill_(0, chosen, True)


def take_sequences(calibration: Calibration, chosen: Tensor) -> Calibration:
    """Some of the sequences, bool [sequences], in the batches they are in."""
    parts = torch.split(chosen, [len(mask) for mask in calibration.token_masks])
    rows = [part.nonzero().squeeze(1) for part in parts]
    return take(calibration, [(number, part) for number, part in enumerate(rows) if len(part)])


def split(calibration: Calibration, sequences: int) -> Calibration:
    """The same sequences in batches of at most so many."""
    pieces = []
    for number, mask in enumerate(calibration.token_masks):
        pieces += [(number, rows) for rows in torch.split(torch.arange(len(mask)), sequences)]
    return take(calibration, pieces)


def _taken(batch: Batch, rows: Tensor, sequences: int) -> Iterator[tuple[str, Any]]:
    """The entries of a batch for some of its sequences; what has no row for each of them serves all."""
    for name, value in batch.items():
        yield name, value[rows] if _has_rows(value, sequences) else value


def _has_rows(value: Any, sequences: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == sequences
