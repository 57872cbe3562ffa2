"""What a model says of a batch: logits, numbers, or where it has no head the mean of its last hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from liar.streams import wide

# Question answering: every position of a sequence is a class, for the beginning and for the end of the answer.
POSITIONS = ("start_logits", "end_logits")


@dataclass(frozen=True)
class Output:
    """One output of a model for one batch, in float32 or wider.

    Attributes:
        name: as the model calls it; `"hidden"` for mean hidden states.
        rows: [rows, *]: log-probabilities of classes that exclude each other, or numbers, or mean hidden states.
        probable: whether the rows are log-probabilities.
        by_token: whether there is a row for each kept token, and not one for each sequence.
    """

    name: str
    rows: Tensor
    probable: bool
    by_token: bool


def outputs(said: Any, keep: Tensor) -> list[Output]:
    """What a model says of the kept tokens, or of whole sequences.

    A mean of hidden states, since that or the like is what is made of them, and what moves single tokens goes out of it.

    Args:
        said: what the model's forward gave, by name.
        keep: bool [sequences, length]: True for real tokens.
    """
    logits = {name: value for name, value in said.items() if name.endswith("logits") and isinstance(value, Tensor)}
    if not logits:
        kept = keep[..., None]
        mean = (wide(said[0]) * kept).sum(1) / kept.sum(1).clamp_min(1)
        return [Output("hidden", mean, probable=False, by_token=False)]
    found = []
    for name, value in logits.items():
        by_token = value.ndim == 3 and value.shape[:2] == keep.shape
        rows = wide(value[keep] if by_token else value)
        if name in POSITIONS:
            # No answer is in the padding. (Not -inf: differences of logarithms are to stay finite.)
            rows = rows.masked_fill(~keep, torch.finfo(rows.dtype).min)
        probable = rows.shape[-1] > 1
        found.append(Output(name, rows.log_softmax(-1) if probable else rows, probable, by_token))
    return found
