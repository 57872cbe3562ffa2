"""The outputs of a model for a batch: logits, numbers, or, without a head, the mean of its last hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from liar.data import Calibration
from liar.errors import ModelError
from liar.models import takes_choices
from liar.runtime.blocks import run_model
from liar.runtime.stream import widen

# Question answering: every position of a sequence is a class, for the beginning and for the end of the answer.
POSITIONS = ("start_logits", "end_logits")


@dataclass(frozen=True)
class Output:
    """One output of a model for one batch, in float32 or wider.

    Attributes:
        name: as the model calls it; `"hidden"` for mean hidden states, `"embeddings"` for a vector of each sequence.
        rows: [rows, *]: log-probabilities, logits, numbers, or mean hidden states.
        kind: `"classes"`: log-probabilities of classes that exclude each other; `"labels"`: logits of labels of which each may
            be there or not; `"numbers"`.
        by_token: whether there is a row for each kept token, and not one for each sequence.
    """

    name: str
    rows: Tensor
    kind: Literal["classes", "labels", "numbers"]
    by_token: bool


def model_outputs(returned: Any, token_mask: Tensor, *, several_labels: bool = False) -> list[Output]:
    """The outputs for the real tokens, or for whole sequences.

    Without a head it is the mean of the hidden states, since that is what users of such a model compute, and what moves
    single tokens averages out of it.

    Args:
        returned: what the model's forward returned, by name.
        token_mask: bool [sequences, length]: True for real tokens.
        several_labels: whether a row's classes do not exclude each other (`problem_type="multi_label_classification"`).
    """
    logits = {name: value for name, value in returned.items() if name.endswith("logits") and isinstance(value, Tensor)}
    if not logits:
        hidden = returned[0]
        if isinstance(hidden, Tensor) and hidden.shape[:-1] == (len(token_mask),):
            return [Output("embeddings", widen(hidden), "numbers", by_token=False)]
        if not isinstance(hidden, Tensor) or hidden.shape[:-1] != token_mask.shape:
            shown = list(hidden.shape) if isinstance(hidden, Tensor) else f"a {type(hidden).__name__}"
            raise ModelError(
                f"the model's first output is {shown}, expected logits, a vector for each sequence, or hidden states "
                f"{[*token_mask.shape, 'channels']}: choose a criterion that needs no outputs, such as 'fluctuation', or give "
                "the bare model (model.base_model)"
            )
        mask = token_mask[..., None]
        mean = (widen(hidden) * mask).sum(1) / mask.sum(1).clamp_min(1)
        return [Output("hidden", mean, "numbers", by_token=False)]
    outputs = []
    for name, value in logits.items():
        by_token = value.ndim == 3 and value.shape[:2] == token_mask.shape
        rows = widen(value[token_mask] if by_token else value)
        if rows.ndim == 1:
            rows = rows[:, None]  # a number for each sequence
        if name in POSITIONS:
            # No answer is in the padding. (Not -inf: differences of logarithms are to stay finite.)
            rows = rows.masked_fill(~token_mask, torch.finfo(rows.dtype).min)
        if several_labels:
            outputs.append(Output(name, rows, "labels", by_token))
        elif rows.shape[-1] > 1:
            outputs.append(Output(name, rows.log_softmax(-1), "classes", by_token))
        else:
            outputs.append(Output(name, rows, "numbers", by_token))
    return outputs


def outputs_of(model: nn.Module, calibration: Calibration, number: int, *, every: int = 1) -> list[Output]:
    """Run one batch: the model's outputs, above 1 for `every` so-many-th position only.

    Such a model has to take `logits_to_keep`.
    """
    batch, token_mask = calibration.batches[number], calibration.token_masks[number]
    if takes_choices(model):
        # Every sequence is a question of its own, with one choice.
        batch = {name: value.unsqueeze(1) if isinstance(value, Tensor) else value for name, value in batch.items()}
    if every > 1:
        positions = torch.arange(token_mask.shape[1], device=token_mask.device)
        token_mask, batch = drawn(token_mask, every), {**batch, "logits_to_keep": drawn(positions[None], every)[0]}
    several_labels = getattr(model.config, "problem_type", None) == "multi_label_classification"
    return model_outputs(run_model(model, batch, calibration.numbers[number]), token_mask, several_labels=several_labels)


def drawn(positions: Tensor, every: int) -> Tensor:
    """Every so-many-th position of [sequences, length], the last of each stretch: it has seen the others."""
    return positions[:, every - 1 :: every]
