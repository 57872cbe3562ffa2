"""What tells one run from another: digests of the model and of the data, options, and versions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from liar.data import Calibration
from liar.models import stored_items
from liar.versions import versions

# Options that no weight and no mask depends on.
WITHOUT_EFFECT = ("quality",)
DIGEST = 16


def run_identity(
    model: nn.Module, calibration: Calibration | None, *groups: Any, teacher: nn.Module | None = None, **others: str
) -> dict[str, Any]:
    """What has to be the same where a run goes on: as JSON can hold it, by what an error may call it.

    Args:
        model: before anything is changed.
        calibration: the batches, if there are any.
        groups: options.
        teacher: the dense model, if it is another.
        others: what else the result depends on, as text.
    """
    options = {name: value for group in groups for name, value in asdict(group).items() if name not in WITHOUT_EFFECT}
    pairs = [] if calibration is None else zip(calibration.batches, calibration.labels, strict=True)
    return {
        "model": _model_digest(model),
        "teacher": None if teacher is None else _model_digest(teacher),
        "calibration data": _digest(
            (f"{number}/{name}", value)
            for number, (batch, labels) in enumerate(pairs)
            for name, value in {**batch, "labels": labels}.items()
        ),
        "versions": versions(),
        **{f"option {name}": _plain(value) for name, value in options.items()},
        **{name: hashlib.blake2b(text.encode(), digest_size=DIGEST).hexdigest() for name, text in others.items()},
    }


def _model_digest(model: nn.Module) -> str:
    config: Any = getattr(model, "config", None)
    entries = {} if config is None else config.to_dict()
    # Where the model came from does not matter.
    kept = {name: value for name, value in entries.items() if not name.startswith("_") and name != "transformers_version"}
    about = {"": f"{type(model).__name__} {json.dumps(kept, sort_keys=True, default=str)}"}
    return _digest(chain(about.items(), stored_items(model)))


def _digest(named: Iterable[tuple[str, Any]]) -> str:
    digest = hashlib.blake2b(digest_size=DIGEST)
    for name, value in named:
        digest.update(name.encode())
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """An option as JSON can hold it."""
    if hasattr(value, "to_json"):
        return value.to_json()
    return list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value
