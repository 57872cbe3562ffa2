"""Images and sound: what is known of them before a model has made tokens of them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from liar.errors import CalibrationError, ModelError
from liar.models import base_and_prefix, family_of

# What models of images and of sound read in place of ids.
SIGNALS = ("pixel_values", "input_values", "input_features")
PROCESSOR = "call its processor, and give batches of what that returns: processor(…, return_tensors='pt')"
# A sound that ends in so many zeros ends in padding: recorded silence is not exactly zero.
SILENCE = 16

logger = logging.getLogger(__name__)


def check_signal(signal: Any, expected: str) -> None:
    """Check the main input of a model of images or sound.

    Raises:
        CalibrationError: it is none; begins with `expected`.
    """
    if not isinstance(signal, Tensor) or not signal.is_floating_point() or signal.ndim < 2:
        actual = f"{signal.dtype} {list(signal.shape)}" if isinstance(signal, Tensor) else f"a {type(signal).__name__}"
        raise CalibrationError(
            f"{expected}, a tensor of floats with a row for each image or sound, got {actual}; call the model's processor with "
            "return_tensors='pt'"
        )


def warn_of_silence(signal: Tensor, where: str) -> None:
    """Say that sounds end in zeros, where no mask tells them from silence."""
    padded = int((signal[:, -SILENCE:] == 0).all(1).sum()) if signal.shape[1] > SILENCE else 0
    if padded:
        logger.warning(
            "%s has no attention_mask, and %d of its %d sounds end in zeros, which count as sound: pass an attention_mask if "
            "the model takes one (processor(…, return_attention_mask=True)), or sounds of one length",
            where, padded, len(signal),
        )  # fmt: skip


def is_signal(batch: Mapping[str, Any]) -> bool:
    """Whether the model reads an image or a sound, and makes tokens of it itself."""
    return batch.keys().isdisjoint(("input_ids", "inputs_embeds"))


class _Entered(Exception):
    """Ends a forward pass at the first block."""


def skeleton_of(model: nn.Module) -> nn.Module:
    """The bare model on the meta device, in evaluation mode, whose first block ends a pass: it tells shapes alone."""
    base, _ = base_and_prefix(model)
    tensors = (*base.named_parameters(remove_duplicate=False), *base.named_buffers(remove_duplicate=False))
    skeleton = copy.deepcopy(base, {id(tensor): _without_values(tensor) for _, tensor in tensors}).train(False)

    def enter(*args: Any, **kwargs: Any) -> None:
        raise _Entered((args[0] if args else kwargs["hidden_states"]).shape[:2])

    blocks: Any = skeleton.get_submodule(family_of(model).blocks)
    blocks[0].forward = enter  # of the encoder, where there is a decoder
    return skeleton


def _without_values(tensor: Tensor) -> Tensor:
    value = torch.empty_like(tensor, device="meta")
    return nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value


def stream_shape(skeleton: nn.Module, batch: Mapping[str, Any]) -> torch.Size:
    """[sequences, length] of what enters the blocks.

    Raises:
        CalibrationError: the model does not take the batch.
    """
    # How long a sequence is depends on the signal alone.
    arguments = {
        name: value.to("meta") if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if name != "attention_mask"
    }
    try:
        with torch.no_grad():
            skeleton(**arguments)
    except _Entered as entered:
        shape: torch.Size = entered.args[0]
        return shape
    except Exception as error:
        actual = {name: list(value.shape) for name, value in batch.items() if isinstance(value, Tensor)}
        raise CalibrationError(
            f"{type(skeleton).__name__} does not take a calibration batch with {actual}: {error}. Expected [sequences, *], as "
            "the model's processor gives it"
        ) from error
    raise ModelError(f"{type(skeleton).__name__} did not call its first block; the family's table names the wrong blocks")
