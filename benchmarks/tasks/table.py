"""What a task is, and how its texts are read."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from benchmarks.data import read

Text = str | tuple[str, str]
AnyText = TypeVar("AnyText", str, tuple[str, str], Text)
Predictions = Mapping[str, Tensor]
SENTENCE_ENDS = re.compile(r"(?<=[.!?])\s+|\n+")


@dataclass(frozen=True)
class Source:
    """Where calibration texts come from.

    Attributes:
        of: `"own"`, the task's train split; `"evaluated"`, what it is evaluated on; `"c4"`. None of them with labels.
        sentences: whether they are split into sentences first.
        mixed_lengths: whether `liar.calibration` takes long ones in pieces, as it does by default.
    """

    of: Literal["own", "evaluated", "c4"] = "c4"
    sentences: bool = False
    mixed_lengths: bool = True


SOURCES = {
    "own": Source("own"),
    "c4": Source(),
    "c4-whole": Source(mixed_lengths=False),
    "c4-sentences": Source(sentences=True),
    # Not what a user has, but about what a repair could do with the best of texts.
    "evaluated": Source("evaluated"),
}


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
        examples: (predictions, data folder) -> what the first number is a statistic of, [examples, columns]; see `paired.py`.
        evaluated: data folder -> the texts (or pairs) that `predict` reads, as calibration texts; None where there are none.
        pack: whether calibration texts are joined and cut into full sequences, as language models are trained.
    """

    name: str
    metrics: Mapping[str, bool]
    load: Callable[[str | None], tuple[PreTrainedModel, Any]]
    own: Callable[[Path | None], Sequence[Text]]
    predict: Callable[[nn.Module, Any, Path | None], Predictions]
    score: Callable[[Predictions, Predictions, Path | None], dict[str, float]]
    max_length: int
    examples: Callable[[Predictions, Path | None], numpy.ndarray]
    evaluated: Callable[[Path | None], Sequence[Text]] | None = None
    pack: bool = False

    def texts(self, data_dir: Path | None, source: str, seed: int) -> list[Text]:
        """Calibration texts of a source in the order of a seed.

        Raises:
            SystemExit: the task cannot give what it is evaluated on.
        """
        chosen = SOURCES[source]
        readers = {"own": self.own, "evaluated": self.evaluated, "c4": partial(_c4, sentences=chosen.sentences)}
        reader = readers[chosen.of]
        if reader is None:
            raise SystemExit(f"{self.name} has no texts for --source {source}: what it is evaluated on is not read as texts")
        texts = reader(data_dir)
        return random.Random(seed).sample(texts, len(texts))


def load_from(folder: str | None, kind: Any, what: str) -> tuple[PreTrainedModel, Any]:
    """(model, tokenizer) of a folder or of the hub, by one of transformers' automatic classes.

    Raises:
        SystemExit: no folder is given; the message says what it should have.
    """
    if folder is None:
        raise SystemExit(f"this task needs --model FOLDER: {what}")
    return kind.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def without(texts: Iterable[AnyText], held_out: Iterable[Text]) -> list[AnyText]:
    """The texts that have no string in common with those that are evaluated on."""
    known = {string for text in held_out for string in _strings(text)}
    return [text for text in texts if known.isdisjoint(_strings(text))]


def _strings(text: Text) -> tuple[str, ...]:
    return (text,) if isinstance(text, str) else text


def _c4(data_dir: Path | None, *, sentences: bool) -> list[Text]:
    texts: list[str] = list(read(data_dir, "c4")["text"])
    return [part for text in texts for part in SENTENCE_ENDS.split(text) if part] if sentences else [*texts]
