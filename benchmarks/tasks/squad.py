"""SQuAD v1.1: which words of a paragraph answer a question, by a model with a question-answering head (see `finetune.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForQuestionAnswering, PreTrainedModel

from benchmarks.data import read
from benchmarks.metrics import metric
from benchmarks.metrics.squad import best, f1
from benchmarks.tasks.table import Predictions, Task, Text, load_from, without

# As for BERT: long paragraphs are read in pieces that overlap by STRIDE tokens; answers have at most LONGEST tokens.
MAX_LENGTH = 384
STRIDE = 128
LONGEST = 30
BATCH = 32


def load(folder: str | None) -> tuple[PreTrainedModel, Any]:
    """A model that gives the first and last token of an answer."""
    what = "a model fine-tuned for question answering (see finetune.py)"
    return load_from(folder, AutoModelForQuestionAnswering, what)


def asked(data_dir: Path | None, every: int) -> Dataset:
    """The questions of the evaluation split, or every so many of them: of all articles."""
    rows = read(data_dir, "squad/dev")
    return rows.select(range(0, len(rows), every))


def pieces(tokenizer: Any, rows: Mapping[str, Sequence[Any]], max_length: int = MAX_LENGTH) -> Any:
    """Questions with their paragraphs, long ones in several pieces, as a fast tokenizer gives them.

    `overflow_to_sample_mapping` says which question a piece belongs to, `offset_mapping` where its tokens are in the text.
    """
    return tokenizer(
        [question.strip() for question in rows["question"]],
        list(rows["context"]),
        truncation="only_second",
        max_length=max_length,
        stride=min(STRIDE, max_length // 4),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )


@torch.inference_mode()
def predict(model: nn.Module, tokenizer: Any, data_dir: Path | None, *, every: int) -> Predictions:
    """Where each answer begins and ends in its paragraph: spans, int64 [questions, 2]."""
    rows = asked(data_dir, every)
    encoded = pieces(tokenizer, rows)
    owner = encoded["overflow_to_sample_mapping"]
    scores, spans = torch.full((len(rows),), -torch.inf), torch.zeros(len(rows), 2, dtype=torch.int64)
    order = sorted(range(len(owner)), key=lambda i: len(encoded["input_ids"][i]))
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in encoded]
    for start in tqdm(range(0, len(order), BATCH), desc="questions", leave=False):
        part = order[start : start + BATCH]
        batch = tokenizer.pad([{name: encoded[name][i] for name in names} for i in part], return_tensors="pt")
        outputs = model(**batch.to(next(model.parameters()).device))
        for i, first, last in zip(part, outputs.start_logits.float().cpu(), outputs.end_logits.float().cpu(), strict=True):
            in_text = torch.tensor([piece == 1 for piece in encoded.sequence_ids(i)])
            score, one, other = best_span(first[: len(in_text)], last[: len(in_text)], in_text)
            if score > scores[owner[i]]:
                offsets = encoded["offset_mapping"][i]
                scores[owner[i]], spans[owner[i]] = score, torch.tensor([offsets[one][0], offsets[other][1]])
    return {"spans": spans}


def best_span(first: Tensor, last: Tensor, in_text: Tensor) -> tuple[float, int, int]:
    """Score, first and last token of the best answer of at most `LONGEST` tokens in the text; all arguments [tokens]."""
    sums = first[:, None] + last[None, :]
    allowed = (in_text[:, None] & in_text[None, :]).triu().tril(LONGEST - 1)
    place = int(sums.masked_fill(~allowed, -torch.inf).argmax())
    one, other = divmod(place, len(first))
    return float(sums[one, other]), one, other


def answers(predictions: Predictions, data_dir: Path | None, every: int) -> tuple[list[str], list[list[str]]]:
    """The predicted answer of every question, and the right ones."""
    rows = asked(data_dir, every)
    spans = predictions["spans"].tolist()
    found = [context[begin:end] for context, (begin, end) in zip(rows["context"], spans, strict=True)]
    return found, [right["text"] for right in rows["answers"]]


def score(predictions: Predictions, dense: Predictions, data_dir: Path | None, *, every: int) -> dict[str, float]:
    """F1 and exact match, the share of answers that are the dense model's, and the number of questions."""
    found, right = answers(predictions, data_dir, every)
    same = (predictions["spans"] == dense["spans"]).all(1).float().mean()
    return {**metric("squad").compute(predictions=found, references=right), "agreement": float(same), "examples": len(found)}


def examples(predictions: Predictions, data_dir: Path | None, *, every: int) -> numpy.ndarray:
    """F1 of every question: [questions, 1]."""
    pairs = zip(*answers(predictions, data_dir, every), strict=True)
    return numpy.array([[best(f1, found, right)] for found, right in pairs])


def own(data_dir: Path | None) -> list[Text]:
    """Questions with their paragraphs, no answers, less those that are evaluated on."""
    return without(_pairs(read(data_dir, "squad/train")), read(data_dir, "squad/dev")["context"])


def evaluated(data_dir: Path | None, every: int) -> list[Text]:
    """The questions that are asked, with their paragraphs."""
    return _pairs(asked(data_dir, every))


def _pairs(rows: Dataset) -> list[Text]:
    return list(zip(rows["question"], rows["context"], strict=True))


def squad(every: int = 1) -> Task:
    """The task with all questions, or with every so many of them, for machines on which all of them take too long."""
    return Task(
        name="squad" + (f"-every-{every}" if every > 1 else ""),
        metrics={"f1": True, "exact_match": True, "agreement": True},
        load=load,
        own=own,
        predict=partial(predict, every=every),
        score=partial(score, every=every),
        max_length=MAX_LENGTH,
        examples=partial(examples, every=every),
        evaluated=partial(evaluated, every=every),
    )


SQUAD_TASKS = (squad(), squad(every=4))
