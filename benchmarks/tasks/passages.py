"""Finding passages, zero-shot: which paragraph of SQuAD dev a question was asked of, by the nearest embedding.

Questions are short and paragraphs long: a repair that is right for one kind of length only shows here.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy
from torch import Tensor, nn

from benchmarks.data import read
from benchmarks.metrics import metric
from benchmarks.tasks.encoder import embed, load_encoder
from benchmarks.tasks.table import Predictions, Task

# As many tokens as all-MiniLM-L6-v2 was made to read.
MAX_LENGTH = 256


@cache
def questions_and_paragraphs(data_dir: Path | None, split: str) -> tuple[list[str], list[str], list[int]]:
    """The different paragraphs, the questions, and the number of each question's paragraph."""
    rows = list(read(data_dir, f"squad/{split}"))
    numbers = {text: number for number, text in enumerate(dict.fromkeys(row["context"] for row in rows))}
    return list(numbers), [row["question"] for row in rows], [numbers[row["context"]] for row in rows]


def predict(model: nn.Module, tokenizer: Any, data_dir: Path | None) -> Predictions:
    """Embeddings of paragraphs and questions, each [texts, hidden]."""
    paragraphs, questions, _ = questions_and_paragraphs(data_dir, "dev")
    return {
        "paragraphs": embed(model, tokenizer, paragraphs, batch_size=32, max_length=MAX_LENGTH),
        "questions": embed(model, tokenizer, questions),
    }


def score(predictions: Predictions, dense: Predictions, data_dir: Path | None) -> dict[str, float]:
    """Share of questions whose paragraph is nearest, mean cosines with the dense embeddings, number of questions."""
    right = questions_and_paragraphs(data_dir, "dev")[2]
    nearest = nearest_paragraph(predictions)
    cosines = {f"{name} cosine": float((predictions[name] * dense[name]).sum(1).mean()) for name in predictions}
    scores = metric("accuracy").compute(predictions=nearest.tolist(), references=right)
    return {**scores, **cosines, "examples": len(right)}


def nearest_paragraph(predictions: Predictions) -> Tensor:
    """The number of the paragraph that is nearest to each question: [questions]."""
    return (predictions["questions"] @ predictions["paragraphs"].T).argmax(1)


def examples(predictions: Predictions, data_dir: Path | None) -> numpy.ndarray:
    """Whether the nearest paragraph is the right one: [questions, 1]."""
    right = questions_and_paragraphs(data_dir, "dev")[2]
    correct: numpy.ndarray = numpy.equal(nearest_paragraph(predictions).numpy(), right)
    return correct[:, None]


def texts(data_dir: Path | None, split: str) -> list[str]:
    """Paragraphs and questions of a split: the one that is evaluated on has other articles than the other."""
    paragraphs, questions, _ = questions_and_paragraphs(data_dir, split)
    return [*paragraphs, *questions]


PASSAGES = Task(
    name="passages",
    metrics={"accuracy": True, "paragraphs cosine": True, "questions cosine": True},
    load=load_encoder,
    own=partial(texts, split="train"),
    predict=predict,
    score=score,
    max_length=MAX_LENGTH,
    examples=examples,
    evaluated=partial(texts, split="dev"),
)
