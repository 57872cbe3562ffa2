"""Calibration data: batches with what is known of their tokens, and the folds that are held out."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from liar.data.batches import Batch, main_input, read_batches
from liar.data.copies import find_copies
from liar.data.decoder import decoder_input, decoder_mask
from liar.data.signals import is_signal, skeleton_of, stream_shape
from liar.errors import CalibrationError
from liar.models import base_and_prefix, check_default_device, check_model

logger = logging.getLogger(__name__)

FOLDS = 4
# Longer sequences are split into pieces of this many tokens, so that a few long ones still fill every fold.
PIECE = 256
# Little data is split into at least so many pieces.
PIECES = 16


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
        distinct_tokens: real tokens without copies: a repeated text counts once, even if it is cut at other places.
        sequences: sequences in all batches.
        labels: per batch its `labels`, or None: only criteria that need gradients look at them.
        numbers: per batch its place in what the user gave, for messages.
        first_sequence: global number of the first sequence.
        encoder: the same batches with the tokens that the encoder reads, where all of the above is of the decoder's.

    Example:
        >>> calibration = liar.Calibration.of(calib, model)
        >>> calibration.tokens == sum(int(mask.sum()) for mask in calibration.token_masks)
        True
    """

    batches: tuple[Batch, ...]
    token_masks: tuple[Tensor, ...]
    folds: tuple[Tensor, ...]
    tokens: int
    distinct_tokens: int
    sequences: int
    labels: tuple[Any, ...]
    numbers: tuple[int, ...]
    first_sequence: int = 0
    encoder: Calibration | None = None

    @classmethod
    def of(
        cls, data: Iterable[Any] | Calibration, model: nn.Module, *, first_sequence: int = 0, total_tokens: int | None = None
    ) -> Calibration:
        """Check what the user gave, before any forward pass, and move it to the model's device.

        Args:
            data: a DataLoader, or any iterable of batches; a batch is a mapping with `input_ids` (or `inputs_embeds`, or the
                `pixel_values` or `input_values` of a model of images or sound) and perhaps `attention_mask` and other
                arguments of the model, or a tensor of ids [sequences, length]. For a model with a decoder it has
                `decoder_input_ids` too, or `labels`, from which they follow. Its
                `labels` are kept beside: the model does not get them. Rows of a tokenised `datasets.Dataset`, mappings with
                one sequence each, are put together in batches. Choices of multiple-choice models [sequences, choices, length]
                are sequences of their own. A `Calibration` is returned as it is.
            model: the model that will be run.
            first_sequence: global number of the first sequence, where `data` is one process's part of the whole.
            total_tokens: real tokens in the data of all processes; those of `data` if left out.

        Raises:
            CalibrationError: nothing in it, all padding, or a batch the model does not take.
            ModelError: the model is none.
        """
        check_model(model)
        check_default_device()
        for name, number in (("first_sequence", first_sequence), ("total_tokens", total_tokens)):
            if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 0):
                raise CalibrationError(f"{name}={number!r}: expected a whole number of at least 0")
        if isinstance(data, Calibration):
            if first_sequence or total_tokens is not None:
                raise CalibrationError("got a Calibration, whose numbers are fixed: pass its batches to number them anew")
            return data
        # A DataLoader draws a seed for its workers.
        with torch.random.fork_rng(devices=[]):
            pairs = read_batches(data, model)
        batches = [batch for batch, _ in pairs]
        if not batches:
            raise CalibrationError(
                "the calibration data is empty: expected at least one batch, got none (a used-up generator?)"
            )
        skeleton = skeleton_of(model) if is_signal(batches[0]) else None
        numbers = (first_sequence, total_tokens)
        keys = [(_token_mask(batch, model, skeleton), main_input(batch)) for batch in batches]
        first = cls._of_tokens(pairs, keys, *numbers)
        decoder_keys = [(decoder_mask(batch), decoder_input(batch)) for batch in batches]
        if decoder_keys[0][0] is None:
            return first
        return replace(cls._of_tokens(pairs, decoder_keys, *numbers), encoder=first)  # type: ignore[arg-type]

    @classmethod
    def _of_tokens(
        cls,
        pairs: Sequence[tuple[Batch, Any]],
        inputs: Sequence[tuple[Tensor, Tensor]],
        first_sequence: int,
        total_tokens: int | None,
    ) -> Calibration:
        """Batches with their labels, by the real tokens of what one stack reads: their masks, and the ids or the signal."""
        token_masks = [mask for mask, _ in inputs]
        tokens = sum(int(mask.sum()) for mask in token_masks)
        if not tokens:
            raise CalibrationError(
                "no token of the calibration data is kept: attention_mask is 0 everywhere (1 marks real tokens)"
            )
        folds, distinct = _folds(inputs, first_sequence, total_tokens or tokens)
        return cls(
            batches=tuple(batch for batch, _ in pairs),
            token_masks=tuple(token_masks),
            folds=folds,
            tokens=tokens,
            distinct_tokens=distinct,
            sequences=sum(len(mask) for mask in token_masks),
            labels=tuple(labels for _, labels in pairs),
            numbers=tuple(range(len(pairs))),
            first_sequence=first_sequence,
        )

    def of_stack(self, stack: int) -> Calibration:
        """The batches with the tokens that a stack of blocks reads: 0 for the only one or an encoder, 1 for its decoder."""
        return self.encoder if stack == 0 and self.encoder is not None else self

    @property
    def inputs(self) -> list[tuple[Tensor, Tensor]]:
        """Per batch the token mask, and what the masked stack reads: ids, embeddings or a signal."""
        read = main_input if self.encoder is None else decoder_input
        return [(mask, read(batch)) for mask, batch in zip(self.token_masks, self.batches, strict=True)]  # type: ignore[misc]

    @property
    def own_tokens(self) -> int:
        """Real tokens in these batches, where they are one process's part of the whole."""
        return sum(int(mask.sum()) for mask in self.token_masks)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Per batch the global number of its first sequence."""
        lengths = (len(mask) for mask in self.token_masks[:-1])
        return tuple(itertools.accumulate(lengths, initial=self.first_sequence))


def refold(calibration: Calibration) -> Calibration:
    """The same batches with folds of their own, as if they were all that the user gave."""
    folds, distinct = _folds(calibration.inputs, calibration.first_sequence, calibration.tokens)
    encoder = calibration.encoder and refold(calibration.encoder)
    return replace(calibration, folds=folds, distinct_tokens=distinct, encoder=encoder)


def _token_mask(batch: Batch, model: nn.Module, skeleton: nn.Module | None) -> Tensor:
    """Which positions are real tokens: bool [sequences, length].

    Args:
        batch: arguments of the bare model's forward.
        model: that takes them.
        skeleton: of it; where it is a model of images or sound, whose tokens are those of the stream that enters the blocks.
    """
    main, mask = main_input(batch), batch.get("attention_mask")
    shape = main.shape[:2] if skeleton is None else stream_shape(skeleton, batch)
    if mask is not None and mask.shape != shape:
        # Models of sound shorten it; transformers' method for that has been there since the first of them.
        base: Any = base_and_prefix(model)[0]
        mask = base._get_feature_vector_attention_mask(shape[1], mask)
    return torch.ones(shape, dtype=torch.bool, device=main.device) if mask is None else mask.bool()


def _folds(inputs: Sequence[tuple[Tensor, Tensor]], first_sequence: int, total_tokens: int) -> tuple[tuple[Tensor, ...], int]:
    """The fold of each real token, per batch, and how many tokens are not copies.

    A fold holds whole pieces of sequences. Its number follows from the sequence's global number, plus one for every piece
    before it; copies are in the fold of the first of them, wherever they are.
    """
    length = max(min(PIECE, total_tokens // PIECES), 1)
    numbers, keys = [], []
    token_masks = [mask for mask, _ in inputs]
    starts = itertools.accumulate((len(mask) for mask in token_masks), initial=first_sequence)
    for (mask, main), start in zip(inputs, starts, strict=False):
        sequence = torch.arange(start, start + len(mask), device=mask.device)[:, None].expand_as(mask)
        numbers.append(torch.stack([sequence, (mask.cumsum(1) - 1) // length])[:, mask].cpu())
        keys.append(token_keys(main, mask)[mask].cpu())
    sequence, piece_of = torch.cat(numbers, 1)
    # Tokens of one piece are neighbours.
    is_first = torch.ones_like(sequence, dtype=torch.bool)
    is_first[1:] = (sequence.diff() != 0) | (piece_of.diff() != 0)
    piece = is_first.cumsum(0) - 1
    leader, new = find_copies(torch.cat(keys).numpy(), sequence.numpy(), piece.numpy())
    fold = ((sequence + piece_of) % FOLDS)[is_first][torch.from_numpy(leader)][piece]
    if (copies := int(np.count_nonzero(leader != np.arange(len(leader))))) and copies * 10 > len(leader):
        logger.warning(
            "%d of %d calibration sequences (long ones in pieces) repeat others, or nearly, and count once: use other texts",
            copies, len(leader),
        )  # fmt: skip
    parts = fold.split([mask.sum().item() for mask in token_masks])
    return tuple(part.to(mask.device) for part, mask in zip(parts, token_masks, strict=True)), int(new.sum())


def token_keys(main: Tensor, token_mask: Tensor) -> Tensor:
    """A number for every token, the same for the same token, or for the same image or sound: int64 [sequences, length].

    Args:
        main: ids [sequences, length], embeddings [sequences, length, channels], or a signal [sequences, *].
        token_mask: bool [sequences, length].
    """
    if not main.is_floating_point():
        return main
    if main.shape[:2] == token_mask.shape and main.ndim == 3:
        return (main.double() * torch.arange(1, main.shape[2] + 1, device=main.device)).sum(2).view(torch.int64)
    rows = main.double().flatten(1)
    keys = (rows * torch.arange(1, rows.shape[1] + 1, device=main.device)).sum(1).view(torch.int64)
    return keys[:, None] + torch.arange(token_mask.shape[1], device=main.device)
