"""Batches a user brings (a DataLoader, mappings, tensors of ids), checked before any forward pass, and split into folds."""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from liar.errors import CalibrationError
from liar.models import base_and_prefix

logger = logging.getLogger(__name__)

FOLDS = 4
# Longer sequences are split into pieces of this many tokens, so that a few long ones still fill every fold.
PIECE = 256
# Little data is split into at least so many pieces.
PIECES = 16

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Calibration:
    """Batches on the model's device, with what is known of their tokens.

    Every sequence has a global number: its place in the whole calibration data, over all processes. Folds and sampled labels
    follow that number, so that they do not depend on how the data is batched or shared among processes.

    Attributes:
        batches: keyword arguments of the bare model's forward.
        token_masks: per batch bool [sequences, length]: True for real tokens.
        folds: per batch int64 [tokens]: the cross-validation fold (0 to `FOLDS` - 1) of each real token.
        tokens: real tokens in all batches.
        sequences: sequences in all batches.
        labels: per batch its `labels`, or None: only criteria that need gradients look at them.
        first_sequence: global number of the first sequence.

    Example:
        >>> calibration = liar.Calibration.of(calib, model)
        >>> calibration.tokens == sum(int(mask.sum()) for mask in calibration.token_masks)
        True
    """

    batches: tuple[Batch, ...]
    token_masks: tuple[Tensor, ...]
    folds: tuple[Tensor, ...]
    tokens: int
    sequences: int
    labels: tuple[Any, ...]
    first_sequence: int = 0

    @classmethod
    def of(
        cls, data: Iterable[Any] | Calibration, model: nn.Module, *, first_sequence: int = 0, total_tokens: int | None = None
    ) -> Calibration:
        """Check what the user gave, before any forward pass, and move it to the model's device.

        Args:
            data: a DataLoader, or any iterable of batches; a batch is a mapping with `input_ids` (or `inputs_embeds`) and
                perhaps `attention_mask` and other arguments of the model, or a tensor of ids [sequences, length]. Its
                `labels` are kept beside: the model does not get them. A `Calibration` is returned as it is.
            model: the model that will be run.
            first_sequence: global number of the first sequence, where `data` is one process's part of the whole.
            total_tokens: real tokens in the data of all processes; those of `data` if left out.

        Raises:
            CalibrationError: nothing in it, all padding, or a batch the model does not take.
        """
        if isinstance(data, Calibration):
            if first_sequence or total_tokens is not None:
                raise CalibrationError("got a Calibration, whose numbers are fixed: pass its batches to number them anew")
            return data
        base, _ = base_and_prefix(model)
        device = next(model.parameters()).device
        accepted = set(inspect.signature(base.forward).parameters)
        pairs = [
            (_as_batch(batch, number, accepted, model, device), _labels(batch, device))
            for number, batch in enumerate(_batches(data))
        ]
        batches = [batch for batch, _ in pairs]
        if not batches:
            raise CalibrationError(
                "the calibration data is empty: expected at least one batch, got none (a used-up generator?)"
            )
        token_masks = [_token_mask(batch) for batch in batches]
        tokens = sum(int(mask.sum()) for mask in token_masks)
        if not tokens:
            raise CalibrationError(
                "no token of the calibration data is kept: attention_mask is 0 everywhere (1 marks real tokens)"
            )
        piece = max(min(PIECE, (total_tokens or tokens) // PIECES), 1)
        starts = itertools.accumulate((len(mask) for mask in token_masks), initial=first_sequence)
        if "use_cache" in accepted:
            batches = [{**batch, "use_cache": False} for batch in batches]
        return cls(
            batches=tuple(batches),
            token_masks=tuple(token_masks),
            folds=tuple(_folds(mask, start, piece) for mask, start in zip(token_masks, starts, strict=False)),
            tokens=tokens,
            sequences=sum(len(mask) for mask in token_masks),
            labels=tuple(labels for _, labels in pairs),
            first_sequence=first_sequence,
        )

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Per batch the global number of its first sequence."""
        lengths = (len(mask) for mask in self.token_masks[:-1])
        return tuple(itertools.accumulate(lengths, initial=self.first_sequence))


def _batches(data: Iterable[Any]) -> Iterable[Any]:
    if isinstance(data, (str, bytes)) or (isinstance(data, Sequence) and data and isinstance(data[0], str)):
        raise CalibrationError("got strings: tokenise them first with liar.calibration(texts, tokenizer)")
    if isinstance(data, (Mapping, Tensor)):
        return [data]
    if not isinstance(data, Iterable):
        raise CalibrationError(f"expected a DataLoader or an iterable of batches, got a {type(data).__name__}")
    return data


def _as_batch(batch: Any, number: int, accepted: set[str], model: nn.Module, device: torch.device) -> Batch:
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping):
        raise CalibrationError(
            f"calibration batch {number}: expected a mapping with input_ids or a tensor of ids, got a {type(batch).__name__}"
        )
    unused = sorted(set(batch) - accepted)
    if unused and number == 0:
        logger.info("not passed to the model: %s", ", ".join(unused))
    taken = {
        name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items() if name in accepted
    }
    _check_batch(taken, number, model, unused)
    return taken


def _labels(batch: Any, device: torch.device) -> Any:
    """The labels of a batch, if it has any; they are checked where they are used."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return labels.to(device) if isinstance(labels, Tensor) else labels


def _check_batch(batch: Batch, number: int, model: nn.Module, unused: list[str]) -> None:
    where = f"calibration batch {number}"
    ids, embeds, mask = (batch.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
    main = ids if ids is not None else embeds
    if not isinstance(main, Tensor) or main.ndim != (2 if main is ids else 3):
        if main is not None and not isinstance(main, Tensor):
            raise CalibrationError(
                f"{where}: expected input_ids, a tensor [sequences, length], got a {type(main).__name__}; call the tokenizer "
                "with return_tensors='pt' and padding=True, or use liar.calibration(texts, tokenizer)"
            )
        actual = list(main.shape) if isinstance(main, Tensor) else f"keys {sorted([*batch, *unused])}"
        raise CalibrationError(f"{where}: expected input_ids, a tensor [sequences, length], got {actual}")
    if ids is not None:
        size = getattr(model.config, "vocab_size", None)
        if ids.is_floating_point() or (size and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size):
            raise CalibrationError(
                f"{where}: expected integer ids from 0 to {size} - 1, got {ids.dtype} from {ids.min()} to {ids.max()}; "
                "was another tokenizer used?"
            )
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != main.shape[:2]):
        actual = list(mask.shape) if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise CalibrationError(f"{where}: expected attention_mask, a tensor of shape {list(main.shape[:2])}, got {actual}")


def _token_mask(batch: Batch) -> Tensor:
    mask = batch.get("attention_mask")
    if mask is not None:
        return torch.as_tensor(mask).bool()
    main = batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"]
    return torch.ones(main.shape[:2], dtype=torch.bool, device=main.device)


def _folds(token_mask: Tensor, first_sequence: int, length: int) -> Tensor:
    """The fold of each real token: its sequence's global number, plus one for every `length` tokens before it."""
    sequence = torch.arange(first_sequence, first_sequence + len(token_mask), device=token_mask.device)[:, None]
    piece = (token_mask.cumsum(1) - 1) // length
    return ((sequence + piece) % FOLDS)[token_mask]
