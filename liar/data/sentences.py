"""Texts for models of sentence-transformers, which know themselves how they read a text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from liar.data.batches import ROWS
from liar.errors import CalibrationError
from liar.models import transformer_in


def transformer_and_data(model: Any, calib: Any) -> tuple[Any, Any]:
    """The transformer inside a model of sentence-transformers, and texts as that model reads them; others as they are."""
    inner = transformer_in(model)
    return (model, calib) if inner is model else (inner, read_by(model, calib))


def read_by(model: Any, calib: Any) -> Any:
    """Texts as batches, tokenised as a model of sentence-transformers does it; any other calibration data as it is.

    The model's default prompt is put before every text, as `encode` does it.

    Args:
        model: of version 6 or later of the package, which has a `preprocess`.
        calib: strings, or pairs of strings (for a `CrossEncoder`): a list, a column of a dataset, a generator.

    Raises:
        CalibrationError: the model cannot read the texts.
    """
    texts = list(calib) if isinstance(calib, Iterator) else calib
    if isinstance(texts, (str, Mapping, Tensor)) or not (hasattr(texts, "__getitem__") and hasattr(texts, "__len__")):
        return texts
    if not len(texts) or not _is_text(next(iter(texts))):
        return texts
    try:
        prompt = model.prompts.get(model.default_prompt_name)
        ordered = sorted(texts, key=lambda text: len(text) if isinstance(text, str) else sum(map(len, text)))
        return [model.preprocess(ordered[start : start + ROWS], prompt=prompt) for start in range(0, len(ordered), ROWS)]
    except Exception as error:  # tokenizers raise whatever they raise
        raise CalibrationError(
            f"expected strings, or pairs of strings, that the {type(model).__name__} reads, got {type(error).__name__}: {error}"
        ) from error


def _is_text(value: Any) -> bool:
    """Whether this is a string, or a pair of strings."""
    return isinstance(value, str) or (
        isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(part, str) for part in value)
    )
