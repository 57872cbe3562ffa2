"""Whether a budget in time gives a model that is as fast as requested.

    python -m benchmarks.latency [--keep 0.75 0.5] [--batch-size 8] [--length 128] [--rounds 15]

Two models: a random LLaMA (4 layers, hidden 512, feed-forward 1376, 8 query and 4 key/value heads) and all-MiniLM-L6-v2. The
layers are timed, and a mask is selected for a share of the dense model's time. Then the pruned model (whose weights need no
repair to be timed) and the dense one take turns, and the median of the ratios counts. Beside it is the share of parameters.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Mapping
from functools import cached_property, partial
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import liar
from benchmarks.results import RESULTS, ResultFile
from benchmarks.speed import MODELS

# For the selection; what is timed has a batch size and a length of its own.
TOKENS = 16_384


class TimedModel:
    """A dense model with its statistics and its timed layers, made when the first missing run needs them."""

    def __init__(self, name: str, batch_size: int, length: int) -> None:
        self.name, self.batch_size, self.length = name, batch_size, length

    @cached_property
    def loaded(self) -> tuple[nn.Module, list[dict[str, Tensor]]]:
        """The model and its calibration batches."""
        return MODELS[self.name](TOKENS, None)

    @cached_property
    def statistics(self) -> liar.CriterionStatistics:
        """What the default criterion needs."""
        return liar.collect(*self.loaded, progress=False)

    @cached_property
    def costs(self) -> liar.Costs:
        """The layers' times."""
        return liar.latency(self.loaded[0], batch_size=self.batch_size, length=self.length)

    def measure(self, keep: float, rounds: int) -> dict[str, Any]:
        """The requested share of the dense model's time, and the measured one."""
        model, _ = self.loaded
        mask = liar.select(model, self.statistics, keep=keep, budget=self.costs)
        pruned = copy.deepcopy(model)
        liar.remove(pruned, mask)
        ids = torch.randint(1000, (self.batch_size, self.length), generator=torch.Generator().manual_seed(0))
        ratios = time_ratios(model, pruned, ids, rounds)
        kept = {site: mask.kept(site) for site in mask.masks}
        layout = liar.discover(model)
        return {
            "dense_seconds": self.costs.dense,
            "planned": self.costs.of(kept) / self.costs.dense,
            "measured": median(ratios),
            "ratios": ratios,
            "parameters": mask.parameters(layout) / layout.parameters,
            "kept": kept,
        }


def time_ratios(dense: nn.Module, pruned: nn.Module, ids: Tensor, rounds: int) -> list[float]:
    """Time of the pruned model over that of the dense one, round by round."""
    batch = liar.Calibration.of([ids], dense).batches[0]
    pairs = [(seconds(dense, batch), seconds(pruned, batch)) for _ in range(rounds + 1)]
    return [short / long for long, short in pairs[1:]]


@torch.inference_mode()
def seconds(model: nn.Module, batch: Mapping[str, Any], at_least: float = 0.3) -> float:
    """Of one forward pass, averaged over as many as take `at_least` seconds together."""
    began, runs = time.perf_counter(), 0
    while time.perf_counter() - began < at_least:
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
    for heading in ("model", "batch", "requested", "planned", "measured", "parameters left"):
        table.add_column(heading, justify="right")
    file = ResultFile(RESULTS / "latency.jsonl")
    for name in MODELS:
        timed = TimedModel(name, arguments.batch_size, arguments.length)
        for keep in arguments.keep:
            key = {"model": name, "batch_size": arguments.batch_size, "length": arguments.length, "keep": keep}
            run = file.get_or_run(key, partial(timed.measure, keep, arguments.rounds))
            numbers = (f"{run[entry]:.3f}" for entry in ("keep", "planned", "measured", "parameters"))
            table.add_row(name, f"{arguments.batch_size} x {arguments.length}", *numbers)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
