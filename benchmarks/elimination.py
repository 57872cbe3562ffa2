"""How good backward elimination is, and how long it takes.

    python -m benchmarks.elimination --data-dir DATA [--tokens 16000]

Two questions. How far from the best of all subsets does it end, on small random problems? And how long does it take for the
1,536 neurons of one layer of all-MiniLM-L6-v2, beside a dense forward pass over the same tokens, and how does that grow with
the width?
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import liar
from benchmarks.results import RESULTS, ResultFile
from benchmarks.tasks import TASKS
from liar.models import layer_of
from liar.selection import eliminate
from liar.selection.elimination import ridged
from liar.selection.error_curves import RIDGE

SMALL, OUT, ROWS, PROBLEMS = 8, 16, 256, 100
WIDTHS = (384, 768, 1536, 3072)
WIDE = 11_008


def normal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def neighbours(generator: torch.Generator) -> Tensor:
    """Inputs of which neighbours correlate: 0.8 to the power of their distance."""
    at = torch.arange(SMALL, dtype=torch.float64)
    root: Tensor = torch.linalg.cholesky(0.8 ** (at[:, None] - at).abs())
    return normal(ROWS, SMALL, generator) @ root.T


def few_causes(generator: torch.Generator) -> Tensor:
    """Mixtures of half as many causes, and noise."""
    causes = normal(ROWS, SMALL // 2, generator) @ normal(SMALL // 2, SMALL, generator)
    return causes + 0.5 * normal(ROWS, SMALL, generator)


def rectified(generator: torch.Generator) -> Tensor:
    """The same, cut off at zero as neurons are."""
    return few_causes(generator).relu()


def mixed(generator: torch.Generator) -> Tensor:
    """Mixtures by a random square matrix: nearly singular now and then, and hard."""
    return normal(ROWS, SMALL, generator) @ normal(SMALL, SMALL, generator)


PROBLEM: dict[str, Callable[[torch.Generator], Tensor]] = {
    "neighbours": neighbours,
    "few causes": few_causes,
    "rectified": rectified,
    "mixed": mixed,
}


def error(gram: Tensor, weight: Tensor, unit_mask: Tensor) -> float:
    """The error that remains with the best weights of the kept channels (bool), from the Schur complement of the removed."""
    kept, removed = unit_mask.nonzero().squeeze(1), (~unit_mask).nonzero().squeeze(1)
    between = torch.linalg.solve(gram[kept][:, kept], gram[kept][:, removed])
    left = gram[removed][:, removed] - gram[removed][:, kept] @ between
    return float((left @ weight[removed] * weight[removed]).sum())


def subsets(count: int) -> Iterator[Tensor]:
    """All ways to keep so many of the small problem's units, bool [units]."""
    for units in itertools.combinations(range(SMALL), count):
        yield torch.zeros(SMALL, dtype=torch.bool).index_fill_(0, torch.tensor(units), True)


def remaining(order: Tensor, count: int) -> Tensor:
    """The units that an elimination leaves."""
    return torch.ones(len(order), dtype=torch.bool).index_fill_(0, order[: len(order) - count], False)


def small(kind: str) -> dict[str, float]:
    """Error above that of the best subset, relative, over random problems and all numbers of kept units."""
    above_best = []
    for seed in range(PROBLEMS):
        generator = torch.Generator().manual_seed(seed)
        x, weight = PROBLEM[kind](generator), normal(SMALL, OUT, generator)
        gram = ridged(x.T @ x, RIDGE)
        order = eliminate(x.T @ x, weight, SMALL, RIDGE).order
        for count in range(1, SMALL):
            best = min(error(gram, weight, unit_mask) for unit_mask in subsets(count))
            above_best.append(error(gram, weight, remaining(order, count)) / best - 1)
    return {"mean": mean(above_best), "median": median(above_best)}


def real(data_dir: Path, tokens: int) -> dict[str, Any]:
    """The time of one elimination of the encoder's last neurons, and of one dense pass."""
    task = TASKS["stsb"]
    model, tokenizer = task.load(None)
    model.train(False)
    batches = liar.calibration(task.texts(data_dir, "own", 0), tokenizer, tokens=tokens, max_length=task.max_length)
    site = liar.discover(model).of_kind("neurons")[-1]
    gram = liar.moments(model, batches, sites=[site.name], progress=False)[site.name].normal(affine=True).gram
    weight = layer_of(model.get_submodule(site.block), site.consumer).matrix.double()
    rounds = []
    for _ in range(5):
        forward = timed(lambda: [model(**batch) for batch in batches])
        neurons = timed(partial(eliminate, gram, weight, site.units, RIDGE))
        rounds.append({"forward": forward, "neurons": neurons, "neurons_ratio": neurons / forward})
    ratio = median(each["neurons_ratio"] for each in rounds)
    return {"rounds": rounds, "neurons_ratio_median": ratio, "units": site.units}


@torch.inference_mode()
def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def growth() -> dict[str, Any]:
    """Seconds by width, the extrapolation of their last growth to a wider layer, and the bytes held there."""
    seconds = []
    for width in WIDTHS:
        generator = torch.Generator().manual_seed(width)
        x = normal(2 * width, width, generator)
        gram, weight = x.T @ x, normal(width, width // 4, generator)
        seconds.append(median(timed(partial(eliminate, gram, weight, width, RIDGE)) for _ in range(3)))
    # In the end it is the cube, however little narrower layers show of it.
    power = max(3.0, float(torch.tensor(seconds[-1] / seconds[-2]).log2()))
    wide = seconds[-1] * (WIDE / WIDTHS[-1]) ** power
    return {
        "widths": WIDTHS,
        "seconds": seconds,
        "power": power,
        "wide": WIDE,
        "wide_seconds_extrapolated": wide,
        # Gram matrix, its inverse, and one copy while the inverse shrinks; float64.
        "wide_gigabytes": 3 * 8 * WIDE**2 / 1e9,
    }


def measure(data_dir: Path, tokens: int) -> dict[str, Any]:
    """All answers."""
    return {"small": {kind: small(kind) for kind in PROBLEM}, "real": real(data_dir, tokens), "growth": growth()}


def rows(result: dict[str, Any]) -> Sequence[Sequence[str]]:
    """Error above the best subset, by kind of problem."""
    return [[kind, *(f"{numbers[name]:.1%}" for name in ("median", "mean"))] for kind, numbers in result["small"].items()]


def main() -> None:
    """Measure what is missing and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16_000)
    arguments = parser.parse_args()
    file = ResultFile(RESULTS / "elimination.jsonl")
    result = file.get_or_run({"tokens": arguments.tokens}, partial(measure, arguments.data_dir, arguments.tokens))
    console = Console(width=100)
    table = Table("problem", "median", "mean", title="error above that of the best of all subsets")
    for row in rows(result):
        table.add_row(*row)
    console.print(table)
    console.print(f"the neurons of a layer take {result['real']['neurons_ratio_median']:.2f} dense passes")
    wide = result["growth"]
    console.print(f"{wide['wide']} neurons: {wide['wide_seconds_extrapolated']:.0f} s by extrapolation")


if __name__ == "__main__":
    main()
