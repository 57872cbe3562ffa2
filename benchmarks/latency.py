"""Whether a budget in time gives a model that is as fast as was asked for.

    python benchmarks/latency.py [--keep 0.75 0.5] [--batch-size 8] [--length 128] [--rounds 15]

Two models: a random LLaMA (4 layers, hidden 512, feed-forward 1376, 8 query and 4 key/value heads) and all-MiniLM-L6-v2. The
layers are timed, and a mask is selected for a share of the dense model's time. Then the slim model (whose weights need no
repair to be timed) and the dense one take turns, and the median of the ratios counts. Beside it stands the share of parameters.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from results import kept
from rich.console import Console
from rich.table import Table
from speed import MODELS
from torch import Tensor, nn

import liar
from liar import slim
from liar.batches import Calibration
from liar.families import discover

RESULTS = Path(__file__).parent / "results"
# For the selection; what is timed has a batch size and a length of its own.
TOKENS = 16_384


def measure(name: str, shares: list[float], batch_size: int, length: int, rounds: int) -> dict[str, Any]:
    """Asked and measured shares of the dense model's time."""
    model, batches = MODELS[name](TOKENS)
    statistics = liar.collect(model, batches, progress=False)
    costs = liar.latency(model, batch_size=batch_size, length=length)
    layout = discover(model)
    ids = torch.randint(1000, (batch_size, length), generator=torch.Generator().manual_seed(0))
    found = []
    for share in shares:
        mask = liar.select(model, statistics, keep=share, budget=costs)
        fast = copy.deepcopy(model)
        slim.remove(fast, mask)
        ratios = against(model, fast, ids, rounds)
        found.append(
            {
                "asked": share,
                "planned": costs.of({site: mask.kept(site) for site in mask.keep}) / costs.dense,
                "measured": median(ratios),
                "ratios": ratios,
                "parameters": mask.parameters(layout) / layout.parameters,
                "kept": {site: mask.kept(site) for site in mask.keep},
            }
        )
    return {"model": name, "batch_size": batch_size, "length": length, "dense_seconds": costs.dense, "shares": found}


def against(dense: nn.Module, fast: nn.Module, ids: Tensor, rounds: int) -> list[float]:
    """Time of the slim model over that of the dense one, round by round."""
    batch = Calibration.of([ids], dense).batches[0]
    pairs = [(seconds(dense, batch), seconds(fast, batch)) for _ in range(rounds + 1)]
    return [short / long for long, short in pairs[1:]]


@torch.inference_mode()
def seconds(model: nn.Module, batch: Mapping[str, Any], least: float = 0.3) -> float:
    """Of one forward pass, on average over so many that they take at least `least`."""
    began, runs = time.perf_counter(), 0
    while time.perf_counter() - began < least:
        model(**batch)
        runs += 1
    return (time.perf_counter() - began) / runs


def main() -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.75, 0.5])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    table = Table(title="time of one forward pass, as a share of the dense model's")
    for heading in ("model", "batch", "asked", "planned", "measured", "parameters left"):
        table.add_column(heading, justify="right")
    for name in MODELS:
        path = RESULTS / f"latency-{name}-batch{arguments.batch_size}x{arguments.length}.json"
        options = (arguments.keep, arguments.batch_size, arguments.length, arguments.rounds)
        for row in kept(path, partial(measure, name, *options))["shares"]:
            numbers = (f"{row[key]:.3f}" for key in ("asked", "planned", "measured", "parameters"))
            table.add_row(name, f"{arguments.batch_size} x {arguments.length}", *numbers)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
