"""What the decoder of a model with two stacks reads: given with a batch, or made from its labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from liar.errors import CalibrationError

# As in transformers: a label that does not count.
IGNORED = -100


def reads_twice(model: nn.Module, accepted: set[str]) -> bool:
    """Whether a model has an encoder and a decoder, whose forward takes these arguments."""
    config = getattr(model, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False)) and "decoder_input_ids" in accepted


def with_decoder_inputs(batch: Mapping[str, Any], labels: Any, model: nn.Module, where: str) -> Mapping[str, Any]:
    """A batch with `decoder_input_ids` and `decoder_attention_mask`, made from its labels where they are not given.

    Args:
        batch: arguments of the bare model's forward.
        labels: of the batch, [sequences, length], -100 for padding; or None.
        model: that takes them.
        where: of the batch, for messages.

    Raises:
        CalibrationError: there is neither, or they have wrong shapes.
    """
    given = next((batch[name] for name in ("decoder_input_ids", "decoder_inputs_embeds") if batch.get(name) is not None), None)
    if given is None:
        if not isinstance(labels, Tensor) or labels.ndim != 2:
            raise CalibrationError(
                f"{where}: {type(model).__name__} has a decoder, which reads a text of its own: expected decoder_input_ids, or "
                "the text that is to be written as labels [sequences, length]: "
                "tokenizer(texts, text_target=targets, return_tensors='pt', padding=True) gives both"
            )
        real = (labels != IGNORED).long()
        batch = {**batch, "decoder_input_ids": _shifted(labels, model, where), "decoder_attention_mask": real}
    elif not isinstance(given, Tensor) or given.ndim not in (2, 3):
        actual = list(given.shape) if isinstance(given, Tensor) else f"a {type(given).__name__}"
        raise CalibrationError(f"{where}: expected decoder_input_ids, a tensor [sequences, length], got {actual}")
    return batch


def decoder_input(batch: Mapping[str, Any]) -> Tensor | None:
    """The ids [sequences, length] that a decoder reads, or embeddings [sequences, length, channels]; None without a decoder."""
    value: Tensor | None = batch.get("decoder_input_ids", batch.get("decoder_inputs_embeds"))
    return value


def decoder_mask(batch: Mapping[str, Any]) -> Tensor | None:
    """Which positions of the decoder are real tokens, bool [sequences, length]; None without a decoder."""
    main, mask = decoder_input(batch), batch.get("decoder_attention_mask")
    if main is None:
        return None
    return torch.ones(main.shape[:2], dtype=torch.bool, device=main.device) if mask is None else mask.bool()


def _shifted(labels: Tensor, model: Any, where: str) -> Tensor:
    """The labels one place later, behind the token with which the decoder starts."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        ids: Tensor = model.prepare_decoder_input_ids_from_labels(labels)
        return ids
    start, padding = model.config.decoder_start_token_id, model.config.pad_token_id
    if start is None:
        raise CalibrationError(
            f"{where}: the configuration of {type(model).__name__} has no decoder_start_token_id, so labels do not say what "
            "the decoder reads: give decoder_input_ids"
        )
    ids = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], 1)
    return ids.masked_fill(ids == IGNORED, padding or 0)
