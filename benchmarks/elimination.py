"""How good backward elimination is, and how long it takes.

    python benchmarks/elimination.py --data-dir DATA [--tokens 16000]

Three questions. How far from the best of all subsets does it end, on small random problems, and what do swaps of a kept and a
removed unit add to it? What do swaps add on the sites of all-MiniLM-L6-v2, also where the library makes none, as there are too
many neurons? How long does it take for the 1,536 neurons of one layer there, and for the 12 heads with their swaps, beside a
dense forward pass over the same tokens, and how does that grow with the width?
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
from results import kept
from rich.console import Console
from rich.table import Table
from tasks import TASKS
from torch import Tensor

import liar
from liar.criteria import Elimination, eliminate
from liar.criteria.elimination import ridged
from liar.criteria.swaps import MOST, swapped
from liar.curves import RIDGE
from liar.families import discover
from liar.sites import linear

RESULTS = Path(__file__).parent / "results"
SMALL, OUT, ROWS, PROBLEMS = 8, 16, 256, 100
WIDTHS = (384, 768, 1536, 3072)
WIDE = 11_008
SHARES = (0.5, 0.3)
KINDS = ("heads", "neurons")
# Swaps that lower the error by less, relative, are not made.
LEAST = 1e-9


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


def error(gram: Tensor, weight: Tensor, kept_channels: Tensor) -> float:
    """What the best weights of the kept channels (bool) still miss: by the Schur complement of the removed ones."""
    keep, gone = kept_channels.nonzero().squeeze(1), (~kept_channels).nonzero().squeeze(1)
    between = torch.linalg.solve(gram[keep][:, keep], gram[keep][:, gone])
    left = gram[gone][:, gone] - gram[gone][:, keep] @ between
    return float((left @ weight[gone] * weight[gone]).sum())


def exchanged(gram: Tensor, weight: Tensor, keep: Tensor) -> tuple[float, int]:
    """The error after swapping a kept neuron for a removed one, best pair first, while that helps; and the number of swaps."""
    keep, now, swaps = keep.clone(), error(gram, weight, keep), 0
    while True:
        gain, (out, back) = best_pair(gram, weight, keep)
        if gain <= LEAST * now:
            return now, swaps
        keep[out], keep[back] = False, True
        now, swaps = now - gain, swaps + 1


def best_pair(gram: Tensor, weight: Tensor, keep: Tensor) -> tuple[float, tuple[int, int]]:
    """By how much the best swap of single channels lowers the error, and the two: all pairs at once, by block elimination."""
    kept_ones, gone = keep.nonzero().squeeze(1), (~keep).nonzero().squeeze(1)
    inverse = torch.linalg.inv(gram[kept_ones][:, kept_ones])
    between = inverse @ gram[kept_ones][:, gone]
    left = gram[gone][:, gone] - gram[gone][:, kept_ones] @ between
    solution, missed = weight[kept_ones] + between @ weight[gone], left @ weight[gone]
    pivot, energy = left.diagonal(), missed.square().sum(1)
    # With a removed one back, the solution and its inverse move by multiples of `between`.
    moved = solution.square().sum(1, keepdim=True) - 2 * between * (solution @ missed.T) / pivot
    moved += between.square() * energy / pivot.square()
    gains = energy / pivot - moved / (inverse.diagonal()[:, None] + between.square() / pivot)
    row, column = divmod(int(gains.argmax()), len(gone))
    return float(gains[row, column]), (int(kept_ones[row]), int(gone[column]))


def refined(gram: Tensor, weight: Tensor, units: int) -> Elimination:
    """What the library makes of one site."""
    found = eliminate(gram, weight, units, RIDGE)
    return swapped(found, gram, weight, RIDGE) if units <= MOST else found


def subsets(count: int) -> Iterator[Tensor]:
    """All ways to keep so many of the small problem's units, bool [units]."""
    for kept_units in itertools.combinations(range(SMALL), count):
        yield torch.zeros(SMALL, dtype=torch.bool).index_fill_(0, torch.tensor(kept_units), True)


def remaining(order: Tensor, count: int) -> Tensor:
    """The units that an elimination leaves."""
    return torch.ones(len(order), dtype=torch.bool).index_fill_(0, order[: len(order) - count], False)


def small(kind: str) -> dict[str, float]:
    """Mean error above that of the best subset, relative, over random problems and all levels."""
    greedy, better = [], []
    for seed in range(PROBLEMS):
        generator = torch.Generator().manual_seed(seed)
        x, weight = PROBLEM[kind](generator), normal(SMALL, OUT, generator)
        gram = ridged(x.T @ x, RIDGE)
        found = eliminate(x.T @ x, weight, SMALL, RIDGE)
        sets = swapped(found, x.T @ x, weight, RIDGE).kept
        for count in range(1, SMALL):
            best = min(error(gram, weight, keep) for keep in subsets(count))
            greedy.append(error(gram, weight, remaining(found.order, count)) / best - 1)
            better.append(error(gram, weight, sets[count]) / best - 1)
    return {"elimination": mean(greedy), "median": median(greedy), "with swaps": mean(better)}


def real(data_dir: Path, tokens: int) -> dict[str, Any]:
    """What swaps add on the sites of the encoder, and the time of one elimination and of one dense pass."""
    task = TASKS["stsb"]
    model, tokenizer = task.load(None)
    model.train(False)
    batches = liar.calibration(task.texts(data_dir, "own", 0), tokenizer, tokens=tokens, max_length=task.max_length)
    found, rounds, work = [], [], dict[str, Callable[[], object]]()
    for site in discover(model).sites:
        gram = liar.moments(model, batches, sites=[site.name], progress=False)[site.name].normal(affine=True).gram
        weight = linear(model.get_submodule(site.block), site.consumer).weight.detach().double().T
        work[site.kind] = partial(refined, gram, weight, site.units)
        nested, sets = eliminate(gram, weight, site.units, RIDGE), refined(gram, weight, site.units)
        for share in SHARES:
            count = max(1, round(share * site.units))
            if site.units <= MOST:
                before, after = (float(each.increases[: site.units - count].sum()) for each in (nested, sets))
                swaps = int((sets.kept[count] & ~remaining(nested.order, count)).sum())
            else:
                keep = remaining(nested.order, count)
                before = error(ridged(gram, RIDGE), weight, keep)
                after, swaps = exchanged(ridged(gram, RIDGE), weight, keep)
            found.append({"site": site.name, "keep": share, "swaps": swaps, "error_ratio": after / before})
    for _ in range(5):
        forward = timed(lambda: [model(**batch) for batch in batches])
        alone = {kind: timed(each) for kind, each in work.items()}
        rounds.append({"forward": forward, **alone, **{f"{kind}_ratio": each / forward for kind, each in alone.items()}})
    medians = {f"{kind}_ratio_median": median(each[f"{kind}_ratio"] for each in rounds) for kind in work}
    return {"sites": found, "rounds": rounds, **medians, "units": site.units}


@torch.inference_mode()
def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def growth() -> dict[str, Any]:
    """Seconds by width, and what their growth between the last two says of a wider layer; and the bytes held there."""
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
    return {
        "tokens": tokens,
        "small": {kind: small(kind) for kind in PROBLEM},
        "real": real(data_dir, tokens),
        "growth": growth(),
    }


def rows(result: dict[str, Any]) -> Sequence[Sequence[str]]:
    """Error above the best subset, by kind of problem."""
    return [
        [kind, *(f"{found[key]:.1%}" for key in ("median", "elimination", "with swaps"))]
        for kind, found in result["small"].items()
    ]


def most_gained(result: dict[str, Any], kind: str) -> float:
    """The largest share of a real site's error that swaps take away."""
    return 1.0 - min(float(site["error_ratio"]) for site in result["real"]["sites"] if site["site"].startswith(kind))


def main() -> None:
    """Measure what is missing and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16_000)
    arguments = parser.parse_args()
    path = RESULTS / f"elimination-tokens{arguments.tokens}.json"
    result = kept(path, partial(measure, arguments.data_dir, arguments.tokens))
    console = Console(width=100)
    table = Table("problem", "median", "mean", "mean with swaps", title="error above that of the best of all subsets")
    for row in rows(result):
        table.add_row(*row)
    console.print(table)
    for kind in KINDS:
        passes = result["real"][f"{kind}_ratio_median"]
        console.print(f"{kind}: swaps take away up to {most_gained(result, kind):.1%}; a site takes {passes:.2f} dense passes")
    wide = result["growth"]
    console.print(f"{wide['wide']} neurons: {wide['wide_seconds_extrapolated']:.0f} s by extrapolation")


if __name__ == "__main__":
    main()
