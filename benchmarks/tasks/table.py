"""What a task is, and how its texts are read."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from datasets import load_dataset
from torch import Tensor, nn
from transformers import PreTrainedModel

Text = str | tuple[str, str]
Predictions = Mapping[str, Tensor]
SOURCES = ("own", "c4", "c4-sentences", "c4-mixed")
SENTENCE_ENDS = re.compile(r"(?<=[.!?])\s+|\n+")


@dataclass(frozen=True)
class Task:
    """One thing to measure.

    Attributes:
        name: as on the command line and in result files.
        metrics: name of each number -> whether more of it is better; the first is what the task is about.
        load: (folder of the model or None for the default) -> (model, tokenizer).
        own: data folder -> calibration texts (or pairs) of the task's train split, no labels.
        predict: (model, tokenizer, data folder) -> what the model says on the evaluation split.
        score: (predictions, the dense model's predictions, data folder) -> numbers.
        max_length: of calibration texts, in tokens.
    """

    name: str
    metrics: Mapping[str, bool]
    load: Callable[[str | None], tuple[PreTrainedModel, Any]]
    own: Callable[[Path], Sequence[Text]]
    predict: Callable[[nn.Module, Any, Path], Predictions]
    score: Callable[[Predictions, Predictions, Path], dict[str, float]]
    max_length: int

    def texts(self, data_dir: Path, source: str, seed: int) -> list[Text]:
        """Calibration texts in the order of a seed: of the task's own train split, or of C4, whole or sentence by sentence.

        Those of `c4-mixed` are whole: `liar.calibration` cuts them to mixed lengths.
        """
        texts = self.own(data_dir) if source == "own" else _c4(data_dir, sentences=source == "c4-sentences")
        return random.Random(seed).sample(texts, len(texts))


@cache
def read(data_dir: Path, file: str) -> Any:
    """A JSON-lines file of the data folder as a `datasets` dataset."""
    return load_dataset("json", data_files=str(data_dir / file), split="train")


def _c4(data_dir: Path, *, sentences: bool) -> list[Text]:
    texts: list[str] = list(read(data_dir, "c4/sample.jsonl.gz")["text"])
    return [part for text in texts for part in SENTENCE_ENDS.split(text) if part] if sentences else [*texts]
