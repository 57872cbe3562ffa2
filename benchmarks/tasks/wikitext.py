"""WikiText-2 by the convention of pruning papers: the raw test text joined, in windows of equal length without overlap.

Perplexities at different lengths cannot be compared: a longer window has more context. With a stride, windows overlap, and of
each only the tokens that the one before has not predicted count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from benchmarks.data import read
from benchmarks.metrics import metric
from benchmarks.tasks.causal import examples, load_causal
from benchmarks.tasks.table import Predictions, Task

# Before the title of an article; those of its sections have more signs.
ARTICLE = re.compile(r"(?m)^(?= = [^=\n]+ = $)")


def joined(data_dir: Path | None, split: str) -> str:
    """The text of a split: its lines, blank ones empty, with a blank line between them, as everybody joins them."""
    return "\n\n".join(line if line.strip() else "" for line in read(data_dir, f"wikitext/{split}")["text"])


def windows(tokens: int, length: int, stride: int) -> Iterator[tuple[int, int]]:
    """Beginning of each full window, and the position in it of the first token whose prediction counts.

    The very first token of a text has nothing to be predicted from, nor has that of a window that shares nothing with the one
    before.
    """
    for begin in range(0, tokens - length + 1, stride):
        yield begin, 1 if begin == 0 else max(1, length - stride)


def predict(
    model: nn.Module, tokenizer: Any, data_dir: Path | None, *, length: int, stride: int, tokens: int | None
) -> Predictions:
    """Of every window the `loss` (summed negative log-likelihood) and the predicted `tokens`: [windows] each."""
    return losses_of(model, tokenizer, joined(data_dir, "test"), length=length, stride=stride, tokens=tokens)


@torch.inference_mode()
def losses_of(
    model: nn.Module, tokenizer: Any, text: str, *, length: int, stride: int | None = None, tokens: int | None = None
) -> Predictions:
    """The same for any text."""
    stride = stride or length
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0, :tokens]
    ids = ids.to(next(model.parameters()).device)
    losses, counts = [], []
    for begin, first in tqdm(list(windows(len(ids), length, stride)), desc="perplexity", leave=False):
        window = ids[begin : begin + length]
        logits: Tensor = model(window[None], use_cache=False).logits[0, first - 1 : -1].float()
        losses.append(float(nn.functional.cross_entropy(logits, window[first:], reduction="sum")))
        counts.append(len(logits))
    if not losses:
        raise SystemExit(f"the text has {len(ids)} tokens, fewer than one window of {length}")
    return {"loss": torch.tensor(losses, dtype=torch.float64), "tokens": torch.tensor(counts)}


def score(predictions: Predictions, dense: Predictions, data_dir: Path | None) -> dict[str, float]:
    """Perplexity with its standard error, and how many tokens were predicted."""
    losses, counts = predictions["loss"].tolist(), predictions["tokens"].tolist()
    return {
        **metric("perplexity").compute(predictions=losses, references=counts),
        "examples": len(counts),
        "predicted": sum(counts),
    }


def articles(data_dir: Path | None, split: str) -> list[str]:
    """Articles of a split."""
    return [article for article in ARTICLE.split(joined(data_dir, split)) if article.strip()]


def wikitext(length: int, *, stride: int | None = None, tokens: int | None = None) -> Task:
    """The task at one length.

    Args:
        length: of windows, and of calibration sequences, in tokens.
        stride: from one window to the next; the length if left out.
        tokens: how many of the test text are read; all if left out.
    """
    return Task(
        name=f"wikitext-{length}" + (f"-stride-{stride}" if stride else "") + (f"-first-{tokens}" if tokens else ""),
        metrics={"perplexity": False},
        load=load_causal,
        own=partial(articles, split="train"),
        predict=partial(predict, length=length, stride=stride or length, tokens=tokens),
        score=score,
        max_length=length,
        examples=examples,
        evaluated=None if tokens else partial(articles, split="test"),
        pack=True,
    )


LENGTHS = (512, 1024, 2048)
# Beginnings of the test text, for machines on which all of it takes too long.
BEGINNINGS = (None, 16_384, 32_768)
WIKITEXT_TASKS = tuple(
    wikitext(length, stride=stride, tokens=tokens)
    for length, tokens in product(LENGTHS, BEGINNINGS)
    for stride in (None, length // 2)
)
