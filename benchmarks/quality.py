"""Quality of each reconstruction on identical masks and calibration tokens.

    python benchmarks/quality.py --task stsb --data-dir DATA --keep 0.7 0.5 0.3
    python benchmarks/quality.py --task tinystories --model STORIES260K --data-dir DATA --keep 0.9 0.8 0.7

One JSON per run in benchmarks/results/quality; runs that are already there are skipped, so a killed benchmark goes on.
"""

from __future__ import annotations

import argparse
import copy
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from results import kept
from rich.console import Console
from rich.table import Table
from tasks import TASKS, Task
from torch import nn

import liar
from liar import slim
from liar.families import discover

RESULTS = Path(__file__).parent / "results" / "quality"


def mask_only(model: nn.Module, mask: liar.Mask, calib: Sequence[Any]) -> None:
    """Cut and do nothing else."""
    slim.remove(model, mask)


def flap_bias(model: nn.Module, mask: liar.Mask, calib: Sequence[Any]) -> None:
    """FLAP: the mean of what was removed goes into the bias. An endless ridge leaves the weights as they are."""
    liar.reconstruct(model, mask, calib, target="same_input", ridge=1e12, bias="create", progress=False)


def same_input(model: nn.Module, mask: liar.Mask, calib: Sequence[Any]) -> None:
    """Our reading of LIAR."""
    liar.reconstruct(model, mask, calib, target="same_input", progress=False)


def dense_stream(model: nn.Module, mask: liar.Mask, calib: Sequence[Any]) -> None:
    """The default."""
    liar.reconstruct(model, mask, calib, target="dense_stream", progress=False)


RULES: dict[str, Callable[[nn.Module, liar.Mask, Sequence[Any]], None]] = {
    "mask_only": mask_only,
    "bias": flap_bias,
    "same_input": same_input,
    "dense_stream": dense_stream,
}


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TASKS), required=True)
    parser.add_argument("--model", help="folder of the model; all-MiniLM-L6-v2 from its package if left out (task stsb)")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--keep", type=float, nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=16_000)
    parser.add_argument("--criterion", default="fluctuation")
    parser.add_argument("--seeds", type=int, default=3, help="samples of the calibration texts")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    task = TASKS[arguments.task]
    model, tokenizer = task.load(arguments.model)

    def score(changed: nn.Module) -> dict[str, float]:
        return {task.metric: task.evaluate(changed, tokenizer, arguments.data_dir)}

    dense = kept(RESULTS / f"{task.name}-dense.json", lambda: score(model))
    rows: dict[tuple[float, str], list[float]] = {}
    for keep in arguments.keep:
        for rule in RULES:
            values = []
            for seed in range(arguments.seeds):
                name = f"{task.name}-{arguments.criterion}-keep{keep}-tokens{arguments.tokens}-{rule}-seed{seed}.json"
                cell = partial(run, task, model, tokenizer, arguments, keep, rule, seed, score)
                values.append(kept(RESULTS / name, cell)[task.metric])
            rows[keep, rule] = values
    show(task, dense[task.metric], rows)


def run(
    task: Task,
    model: nn.Module,
    tokenizer: Any,
    arguments: argparse.Namespace,
    keep: float,
    rule: str,
    seed: int,
    score: Callable[[nn.Module], dict[str, float]],
) -> dict[str, Any]:
    """One cell: the same texts and so the same mask for every rule."""
    changed = copy.deepcopy(model)
    texts = task.texts(arguments.data_dir, seed)
    calib = liar.calibration(texts, tokenizer, tokens=arguments.tokens, max_length=task.max_length)
    mask = liar.select(changed, calib, keep=keep, criterion=arguments.criterion, progress=False)
    began = time.perf_counter()
    RULES[rule](changed, mask, calib)
    seconds = time.perf_counter() - began
    result = {
        **score(changed),
        "task": task.name,
        "keep": keep,
        "got": mask.parameters(discover(model)) / discover(model).parameters,
        "criterion": arguments.criterion,
        "tokens": arguments.tokens,
        "rule": rule,
        "seed": seed,
        "seconds": seconds,
    }
    logging.info("%s keep %s %s seed %s: %.4f in %.1f s", task.name, keep, rule, seed, result[task.metric], seconds)
    return result


def show(task: Task, dense: float, rows: dict[tuple[float, str], list[float]]) -> None:
    """Mean and spread over the samples of calibration texts."""
    table = Table(title=f"{task.name}: {task.metric}, dense {dense:.4f}")
    for heading in ("keep", *RULES):
        table.add_column(heading, justify="right")
    for keep in dict.fromkeys(keep for keep, _ in rows):
        cells = [rows[keep, rule] for rule in RULES]
        table.add_row(str(keep), *(f"{mean(c):.4f} ± {stdev(c) if len(c) > 1 else 0:.4f}" for c in cells))
    Console().print(table)


if __name__ == "__main__":
    main()
