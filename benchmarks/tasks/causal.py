"""Causal language models (`--model FOLDER`) on the TinyStories hold-out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.data import read
from benchmarks.metrics import metric
from benchmarks.tasks.table import Predictions, Task, load_from

MAX_LENGTH = 512
# Whole next-token distributions are kept and compared for the first stories only.
COMPARED = 60


def load_causal(folder: str | None) -> tuple[PreTrainedModel, Any]:
    """A causal language model."""
    return load_from(folder, AutoModelForCausalLM, "a causal language model")


@torch.inference_mode()
def predict(model: nn.Module, tokenizer: Any, data_dir: Path | None) -> Predictions:
    """Every story for itself, from its first token, cut at 512 tokens.

    Returns:
        loss [stories] (summed negative log-likelihood), tokens [stories] (predicted ones), logits [tokens, vocabulary] of the
        first stories.
    """
    losses, counts, kept = [], [], []
    for number, text in enumerate(tqdm(evaluated(data_dir), desc="perplexity", leave=False)):
        ids = tokenizer(text, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")["input_ids"]
        ids = ids.to(next(model.parameters()).device)
        logits: Tensor = model(ids, use_cache=False).logits[0, :-1].float()
        losses.append(float(nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")))
        counts.append(len(logits))
        if number < COMPARED:
            kept.append(logits.cpu())
    return {"loss": torch.tensor(losses, dtype=torch.float64), "tokens": torch.tensor(counts), "logits": torch.cat(kept)}


def score(predictions: Predictions, dense: Predictions, data_dir: Path | None) -> dict[str, float]:
    """Token perplexity, and how far the next-token distributions are from the dense model's (mean over tokens)."""
    perplexity = metric("perplexity").compute(
        predictions=predictions["loss"].tolist(), references=predictions["tokens"].tolist()
    )
    near = metric("agreement_kl").compute(predictions=predictions["logits"].numpy(), references=dense["logits"].numpy())
    return {**perplexity, **near, "compared_tokens": len(dense["logits"])}


def own(data_dir: Path | None) -> list[str]:
    """Stories of the TinyStories train part."""
    return list(read(data_dir, "tinystories/train")["text"])


def evaluated(data_dir: Path | None) -> list[str]:
    """Stories of the hold-out."""
    return list(read(data_dir, "tinystories/test")["text"])


def examples(predictions: Predictions, _: Path | None) -> numpy.ndarray:
    """Summed negative log-likelihood and predicted tokens of every text: [texts, 2]."""
    return numpy.stack([predictions["loss"].numpy(), predictions["tokens"].numpy()], 1)


TINYSTORIES = Task(
    name="tinystories",
    metrics={"perplexity": False, "kl": False, "agreement": True},
    load=load_causal,
    own=own,
    predict=predict,
    score=score,
    max_length=MAX_LENGTH,
    examples=examples,
    evaluated=evaluated,
)
