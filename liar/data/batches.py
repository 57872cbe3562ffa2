"""Batches as users bring them (a DataLoader, mappings, tensors of ids, rows of a dataset), checked before any forward pass."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from liar.data.decoder import IGNORED, reads_twice, with_decoder_inputs
from liar.data.signals import PROCESSOR, SIGNALS, check_signal, warn_of_silence
from liar.errors import CalibrationError
from liar.models import base_and_prefix, compute_device, takes_choices
from liar.options import is_iterable

logger = logging.getLogger(__name__)

# Single sequences are put together in batches of so many.
ROWS = 32
# What a forward that only says *args and **kwargs is given.
INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids")
IDS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# What a decoder reads that has an encoder before it: as long as it likes.
DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask")

Batch = Mapping[str, Any]


def read_batches(data: Iterable[Any], model: nn.Module) -> list[tuple[Batch, Any]]:
    """What the user gave as (arguments of the bare model's forward, labels), on the model's device.

    Args:
        data: as for `Calibration.of`.
        model: the model that will be run.

    Raises:
        CalibrationError: a batch the model does not take.
    """
    _check_kind(data, model)
    base, _ = base_and_prefix(model)
    device = compute_device(model)
    accepted = _accepted(base)
    has_decoder = reads_twice(model, accepted)
    pairs = [
        (_as_batch(batch, number, accepted, model, device), _labels(batch, device))
        for number, batch in enumerate(_batches(data, has_decoder=has_decoder))
    ]
    if has_decoder:
        pairs = [
            (with_decoder_inputs(batch, labels, model, f"calibration batch {number}"), labels)
            for number, (batch, labels) in enumerate(pairs)
        ]
    always = {"use_cache": False} if "use_cache" in accepted else {}
    return [({**batch, **always}, labels) for batch, labels in pairs if main_input(batch).numel()]


def main_input(batch: Batch) -> Tensor:
    """The ids [sequences, length], or in place of them embeddings [sequences, length, channels], or a signal [sequences, *]."""
    value: Tensor = next(batch[name] for name in ("input_ids", "inputs_embeds", *SIGNALS) if name in batch)
    return value


def _accepted(base: nn.Module) -> set[str]:
    """Names of the arguments of a model's forward."""
    parameters = inspect.signature(base.forward).parameters
    anything = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    return {*parameters, *(INPUTS if anything and not parameters.keys() & set(INPUTS) else ())}


def _check_kind(data: Any, model: nn.Module) -> None:
    """Refuse texts, pictures and sounds as they are: a model reads what its tokenizer or processor makes of them.

    Raises:
        CalibrationError: says what to call.
    """
    first = data[0] if isinstance(data, Sequence) and len(data) else data
    signal = str(getattr(model, "main_input_name", "input_ids"))
    if isinstance(first, (str, bytes)) and signal in SIGNALS:
        raise CalibrationError(f"got strings, but a {type(model).__name__} reads {signal}: {PROCESSOR}")
    if isinstance(first, (str, bytes)):
        raise CalibrationError("got strings: tokenise them first with liar.calibration(texts, tokenizer)")
    if signal in SIGNALS and hasattr(first, "convert"):  # PIL
        raise CalibrationError(f"got a picture: {PROCESSOR}")


def _batches(data: Iterable[Any], *, has_decoder: bool) -> Iterator[Any]:
    """The batches, with single sequences put together."""
    if isinstance(data, (Mapping, Tensor)):
        data = [data]
    if not is_iterable(data):
        raise CalibrationError(f"expected a DataLoader or an iterable of batches, got a {type(data).__name__}")
    rows: list[Batch] = []
    for batch in data:
        is_row = isinstance(batch, Mapping) and _is_sequence(batch.get("input_ids"))
        if is_row:
            rows.append(batch)
        if rows and (not is_row or len(rows) == ROWS):
            yield _together(rows, has_decoder=has_decoder)
            rows = []
        if not is_row:
            yield batch
    if rows:
        yield _together(rows, has_decoder=has_decoder)


def _is_sequence(ids: Any) -> bool:
    """Whether these are the ids of one sequence: a list of numbers, or a tensor or array of one dimension."""
    if isinstance(ids, list):
        return all(isinstance(each, int) for each in ids)
    return getattr(ids, "ndim", None) == 1


def _length(value: Any) -> int:
    """Of a list, tensor or array of one dimension; -1 for anything else."""
    if isinstance(value, list):
        return len(value)
    shape: Any = getattr(value, "shape", ())
    return int(shape[0]) if len(shape) == 1 else -1


def _together(rows: Sequence[Batch], *, has_decoder: bool) -> Batch:
    """Single sequences as one batch, padded on the right."""
    lengths = [_length(row["input_ids"]) for row in rows]
    names = dict.fromkeys(name for row in rows for name in row)
    batch = {}
    for name in names:
        values = [row.get(name) for row in rows]
        # What a decoder reads and writes has a length of its own.
        own = has_decoder and name in (*DECODER_INPUTS, "labels")
        batch[name] = _column(name, values, [_length(value) for value in values] if own else lengths)
    batch = {name: value for name, value in batch.items() if value is not None}
    if len(set(lengths)) > 1 and "attention_mask" not in batch:
        batch["attention_mask"] = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return batch


def _column(name: str, values: list[Any], lengths: list[int]) -> Tensor | None:
    """One entry of all rows as a tensor: padded if there is a value for every token, else stacked; None if it is none of these.

    A row without a mask has no padding.
    """
    if name == "attention_mask":
        values = [[1] * length if value is None else value for value, length in zip(values, lengths, strict=True)]
    try:
        tensors = [torch.as_tensor(value) for value in values]
        if [_length(value) for value in values] == lengths:
            return pad_sequence(tensors, batch_first=True, padding_value=IGNORED if name == "labels" else 0)
        return torch.stack(tensors)
    except (TypeError, ValueError, RuntimeError) as error:
        if name not in (*INPUTS, "labels"):
            return None  # a text, an identifier: not for the model
        raise CalibrationError(
            f"calibration rows: expected {name} as numbers in every row or in none, one for each token or as many in all rows: "
            f"{error}"
        ) from error


def _as_batch(batch: Any, number: int, accepted: set[str], model: nn.Module, device: torch.device) -> Batch:
    if isinstance(batch, Tensor):
        batch = {getattr(model, "main_input_name", "input_ids"): batch}
    if not isinstance(batch, Mapping):
        raise CalibrationError(
            f"calibration batch {number}: expected a mapping with input_ids or a tensor of ids, got a {type(batch).__name__}"
        )
    batch = {name: _as_tensor(name, value, number) for name, value in batch.items()}
    if absent := [name for name, value in batch.items() if isinstance(value, Tensor) and value.is_meta]:
        raise CalibrationError(f"calibration batch {number}: {absent[0]} is on the meta device: it holds no values")
    unused = sorted(set(batch) - accepted, key=str)
    if unused and number == 0:
        logger.info("not passed to the model: %s", ", ".join(map(str, unused)))
    taken = {
        name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items() if name in accepted
    }
    if taken.get("input_ids") is None:
        taken.pop("input_ids", None)
    if takes_choices(model) and getattr(taken.get("input_ids"), "ndim", 0) == 3:
        # The bare model sees every choice as a sequence.
        taken = {name: value.flatten(0, 1) if isinstance(value, Tensor) else value for name, value in taken.items()}
    _check_batch(taken, number, model, unused)
    if "input_ids" in taken:
        taken["input_ids"] = taken["input_ids"].long()
    return _derived_mask(taken, number, model)


def _as_tensor(name: str, value: Any, number: int) -> Any:
    """Arrays and lists of what a model takes as tensors."""
    if name not in (*INPUTS, "labels") or not isinstance(value, (list, np.ndarray)):
        return value
    if isinstance(value, list) and any(isinstance(each, Tensor) for each in value):
        raise CalibrationError(
            f"calibration batch {number}: expected {name}, a tensor [sequences, length], got a list of tensors; torch's "
            'default collation makes this of lists, position by position: use dataset.with_format("torch"), or a collate_fn'
        )
    try:
        return torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CalibrationError(
            f"calibration batch {number}: expected {name}, a tensor [sequences, length], got a {type(value).__name__}; call "
            "the tokenizer with return_tensors='pt' and padding=True, or use liar.calibration(texts, tokenizer)"
        ) from error


def _labels(batch: Any, device: torch.device) -> Any:
    """The labels of a batch, if it has any; they are checked where they are used."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return labels.to(device) if isinstance(labels, Tensor) else labels


def _check_batch(batch: Batch, number: int, model: nn.Module, unused: list[str]) -> None:
    where = f"calibration batch {number}"
    if (signal := getattr(model, "main_input_name", None)) in SIGNALS:
        check_signal(batch.get(signal), f"{where}: expected {signal}")
        if signal == "input_values" and batch.get("attention_mask") is None:
            warn_of_silence(batch[signal], where)
        _check_mask(batch.get("attention_mask"), batch[signal].shape[:2], where)
        return
    ids, embeds, mask = (batch.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
    main = ids if ids is not None else embeds
    if not isinstance(main, Tensor) or main.ndim != (2 if main is ids else 3):
        if main is not None and not isinstance(main, Tensor):
            raise CalibrationError(
                f"{where}: expected input_ids, a tensor [sequences, length], got a {type(main).__name__}; call the tokenizer "
                "with return_tensors='pt' and padding=True, or use liar.calibration(texts, tokenizer)"
            )
        keys = f"keys {sorted(map(str, [*batch, *unused]))}; texts are tokenised first, with liar.calibration(texts, tokenizer)"
        actual = list(main.shape) if isinstance(main, Tensor) else keys
        raise CalibrationError(f"{where}: expected input_ids, a tensor [sequences, length], got {actual}")
    if ids is not None:
        size = getattr(model.config, "vocab_size", None)
        if ids.dtype not in IDS or ids.layout is not torch.strided:
            raise CalibrationError(f"{where}: expected integer ids, got {ids.dtype} ({ids.layout})")
        if size and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            raise CalibrationError(
                f"{where}: expected integer ids from 0 to {size} - 1, got {ids.dtype} from {ids.min()} to {ids.max()}; "
                "was another tokenizer used?"
            )
    elif not main.is_floating_point():
        raise CalibrationError(f"{where}: expected inputs_embeds of a float type, got {main.dtype}")
    _check_mask(mask, main.shape[:2], where)


def _check_mask(mask: Any, shape: torch.Size, where: str) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.shape != shape:
        actual = list(mask.shape) if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise CalibrationError(f"{where}: expected attention_mask, a tensor of shape {list(shape)}, got {actual}")
    if mask.layout is not torch.strided:
        raise CalibrationError(f"{where}: expected a dense attention_mask, got {mask.layout}")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise CalibrationError(f"{where}: expected an attention_mask of 1 for real tokens and 0 for padding, got other values")


def _derived_mask(batch: Batch, number: int, model: nn.Module) -> Batch:
    """A batch without a mask whose rows begin or end in the padding token gets one, where that token is nothing else."""
    ids, padding = batch.get("input_ids"), getattr(model.config, "pad_token_id", None)
    if ids is None or batch.get("attention_mask") is not None or not isinstance(padding, int) or not ids.numel():
        return batch
    real = (ids != padding).long()
    inside = (real.cummax(1).values * real.flip(1).cummax(1).values.flip(1)).bool()
    padded = int((~inside).any(1).sum())
    ends = getattr(model.config, "eos_token_id", None)
    if not padded or not bool(inside.any()):
        return batch
    if padding in (ends if isinstance(ends, (list, tuple)) else (ends,)):
        if bool((~inside).sum(1).max() > 1):
            logger.warning(
                "calibration batch %d has no attention_mask, and %d of its %d sequences begin or end in several tokens %d, "
                "which is the padding token as well as the end of a text: all of them count as text; pass an attention_mask",
                number, padded, len(ids), padding,
            )  # fmt: skip
        return batch
    logger.warning(
        "calibration batch %d has no attention_mask, and %d of its %d sequences begin or end in the padding token (%d): that "
        "is taken as padding; pass an attention_mask if it is text",
        number, padded, len(ids), padding,
    )  # fmt: skip
    return {**batch, "attention_mask": inside.long()}
