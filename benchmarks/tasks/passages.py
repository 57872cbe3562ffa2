"""Finding passages, zero-shot: which paragraph of SQuAD dev a question was asked of, by the nearest embedding.

Questions are short and paragraphs long: a repair that is right for one kind of length only shows here. Articles of
`heldout_titles.json` are evaluated on; the texts of all others are the task's own for calibration.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.metrics import metric
from benchmarks.tasks.encoder import embed, load_encoder
from benchmarks.tasks.table import Predictions, Task, read

# As many tokens as all-MiniLM-L6-v2 was made to read.
MAX_LENGTH = 256


@cache
def questions_and_paragraphs(data_dir: Path, *, held_out: bool) -> tuple[list[str], list[str], list[int]]:
    """The different paragraphs, the questions, and the number of each question's paragraph."""
    titles = set(json.loads((data_dir / "squad_v1.1/heldout_titles.json").read_text(encoding="utf-8")))
    rows = [row for row in read(data_dir, "squad_v1.1/dev.jsonl.gz") if (row["title"] in titles) is held_out]
    numbers = {text: number for number, text in enumerate(dict.fromkeys(row["context"] for row in rows))}
    return list(numbers), [row["question"] for row in rows], [numbers[row["context"]] for row in rows]


def predict(model: nn.Module, tokenizer: Any, data_dir: Path) -> Predictions:
    """Embeddings of paragraphs and questions, each [texts, hidden]."""
    paragraphs, questions, _ = questions_and_paragraphs(data_dir, held_out=True)
    return {
        "paragraphs": embed(model, tokenizer, paragraphs, batch_size=32, max_length=MAX_LENGTH),
        "questions": embed(model, tokenizer, questions),
    }


def score(predictions: Predictions, dense: Predictions, data_dir: Path) -> dict[str, float]:
    """Share of questions whose paragraph is nearest, mean cosines with the dense embeddings, number of questions."""
    *_, right = questions_and_paragraphs(data_dir, held_out=True)
    nearest = (predictions["questions"] @ predictions["paragraphs"].T).argmax(1)
    cosines = {f"{name} cosine": float((predictions[name] * dense[name]).sum(1).mean()) for name in predictions}
    scores = metric("accuracy").compute(predictions=nearest.tolist(), references=right)
    return {**scores, **cosines, "examples": len(right)}


def own(data_dir: Path) -> list[str]:
    """Paragraphs and questions of the other articles."""
    paragraphs, questions, _ = questions_and_paragraphs(data_dir, held_out=False)
    return [*paragraphs, *questions]


PASSAGES = Task(
    "passages",
    {"accuracy": True, "paragraphs cosine": True, "questions cosine": True},
    load_encoder,
    own,
    predict,
    score,
    MAX_LENGTH,
)
