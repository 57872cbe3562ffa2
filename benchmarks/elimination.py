"""How far from the best of all subsets backward elimination ends, on small random problems.

    python -m benchmarks.elimination

How long it takes is in `benchmarks.growth`.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from statistics import mean, median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.results import RESULTS, ResultFile
from liar.selection import eliminate
from liar.selection.elimination import ridged
from liar.selection.error_curves import RIDGE

SMALL, OUT, ROWS, PROBLEMS = 8, 16, 256, 100


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


def rows(result: dict[str, Any]) -> Sequence[Sequence[str]]:
    """Error above the best subset, by kind of problem."""
    return [[kind, *(f"{numbers[name]:.1%}" for name in ("median", "mean"))] for kind, numbers in result["small"].items()]


def main() -> None:
    """Measure what is missing and print it."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    file = ResultFile(RESULTS / "elimination.jsonl")
    result = file.get_or_run({"problems": PROBLEMS}, lambda: {"small": {kind: small(kind) for kind in PROBLEM}})
    table = Table("problem", "median", "mean", title="error above that of the best of all subsets")
    for row in rows(result):
        table.add_row(*row)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
