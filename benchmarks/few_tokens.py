"""Whether the default repair is ever worse than the mask alone, however few calibration tokens there are.

    python -m benchmarks.few_tokens --model minilm=FOLDER --model stories260K=FOLDER

Random masks, calibration and held-out text from `pydoc_data.topics`, which every Python has. The error of an encoder is 1 less
the cosine of its mean hidden states with the dense model's; that of a language model the Kullback-Leibler divergence from the
dense model's predictions, per token. The ratio is the error of the repaired model over that of the model that was only cut.
Each setting also runs without the library's rule that too little text changes nothing ("no rule").
"""

from __future__ import annotations

import argparse
import copy
import itertools
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from math import inf
from pathlib import Path
from pydoc_data.topics import topics
from statistics import mean, median
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from transformers import AutoTokenizer

import liar
from benchmarks.results import RESULTS, ResultFile
from benchmarks.summary import show
from liar.repair import context

TOKENS = (1, 2, 3, 5, 10, 30, 100, 300, 1000, 3000)
# (share kept, seed) of every random mask.
MASKS = tuple((keep, seed) for keep in (0.5, 0.7, 0.9) for seed in range(5))
HELD_OUT = 32
FILE = RESULTS / "few_tokens.jsonl"


@cache
def paragraphs() -> tuple[str, ...]:
    """Paragraphs of Python's own documentation, in random order."""
    found = [part.strip() for text in topics.values() for part in text.split("\n\n") if len(part) > 80]
    random.Random(0).shuffle(found)
    return tuple(found)


@cache
def loaded(folder: str) -> tuple[nn.Module, Any]:
    """A dense model and its tokenizer."""
    return liar.load(folder), AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def outputs(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """Log-probabilities of every real token, or the mean hidden states of every sequence."""
    rows = []
    for batch in batches:
        returned, real = model(**batch), batch["attention_mask"]
        if "logits" in returned:
            rows.append(returned.logits[real.bool()].log_softmax(-1))
        else:
            rows.append((returned[0] * real[..., None]).sum(1) / real.sum(1, keepdim=True))
    return torch.cat(rows)


def error(dense: Tensor, pruned: Tensor, *, is_encoder: bool) -> float:
    """How far a pruned model's outputs are from the dense model's."""
    if is_encoder:
        return float(1 - torch.nn.functional.cosine_similarity(dense, pruned).mean())
    return float(torch.nn.functional.kl_div(pruned, dense, log_target=True, reduction="batchmean"))


@contextmanager
def no_rule() -> Iterator[None]:
    """Let any number of tokens change the weights."""
    before = context.FEWEST_TOKENS, context.TOKENS_PER_CHANNEL
    context.FEWEST_TOKENS = context.TOKENS_PER_CHANNEL = 0
    try:
        yield
    finally:
        context.FEWEST_TOKENS, context.TOKENS_PER_CHANNEL = before


def run(folder: str, keep: float, seed: int, tokens: int, *, rule: bool = True) -> dict[str, Any]:
    """One mask and one number of calibration tokens."""
    dense, tokenizer = loaded(folder)
    texts = list(paragraphs())
    held = liar.calibration(texts[:HELD_OUT], tokenizer, max_length=64, mixed_lengths=False)
    own = texts[HELD_OUT:]
    random.Random(seed).shuffle(own)
    calib = liar.calibration(own, tokenizer, max_length=64, tokens=tokens)
    mask = liar.select(dense, keep=keep, criterion="random", seed=seed, progress=False)
    cut, repaired = copy.deepcopy(dense), copy.deepcopy(dense)
    liar.remove(cut, mask)
    with nullcontext() if rule else no_rule():
        report = liar.reconstruct(repaired, mask, calib, progress=False)
    target, is_encoder = outputs(dense, held), "logits" not in dense(**held[0])
    return {
        "mask_only": error(target, outputs(cut, held), is_encoder=is_encoder),
        "repaired": error(target, outputs(repaired, held), is_encoder=is_encoder),
        "changed": sum(site.ridge < inf for site in report.sites) / len(report.sites),
    }


def rows(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """By model and tokens: masks, share of the sites that were changed, median and largest ratio; and without the rule."""
    table = []
    for model in dict.fromkeys(record["model"] for record in records):
        for tokens in TOKENS:
            cells = [model, f"{tokens:,}"]
            for rule in (True, False):
                own = {"model": model, "tokens": tokens, "rule": rule}
                found = [each for each in records if own.items() <= each.items()]
                ratios = [each["repaired"] / each["mask_only"] for each in found]
                if rule:
                    cells += [str(len(found)), f"{mean(each['changed'] for each in found):.0%}"]
                cells += [f"{median(ratios):.3f}", f"{max(ratios):.3f}"]
            table.append(cells)
    return table


HEADINGS = ("model", "tokens", "masks", "sites changed", "median ratio", "largest", "median, no rule", "largest, no rule")


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, metavar="NAME=FOLDER", help="may be given several times")
    parser.add_argument("--out", type=Path, default=FILE, help="JSON lines; what is in it is not run again")
    arguments = parser.parse_args()
    file = ResultFile(arguments.out)
    models = [each.partition("=") for each in arguments.model]
    jobs = list(itertools.product(models, TOKENS, MASKS, (True, False)))
    for (name, _, folder), tokens, (keep, seed), rule in track(jobs, description="few tokens"):
        key = {"model": name, "keep": keep, "seed": seed, "tokens": tokens, "rule": rule}
        file.get_or_run(key, partial(run, folder, keep, seed, tokens, rule=rule))
    show(HEADINGS, rows(file.records), width=100, title="error of the repaired model over that of the mask alone")


if __name__ == "__main__":
    main()
