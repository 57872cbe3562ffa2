"""How the cost of selecting and reconstructing grows with tokens, width and layers, and that of the elimination alone.

    python -m benchmarks.growth [--only tokens width layers elimination]

Random LLaMAs; one thing grows while the others stay. Every point is timed twice, and the faster one counts. The elimination is
timed on one layer by itself, with its peak memory in a process of its own. Points that are in results/growth.jsonl are skipped;
`benchmarks.publish` draws docs/images/growth.png from them.
"""

from __future__ import annotations

import argparse
import copy
import logging
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

import liar
from benchmarks.results import RESULTS, Record, ResultFile
from benchmarks.speed import growth_of_memory, plain, random_llama
from benchmarks.summary import show
from liar.selection import eliminate
from liar.selection.error_curves import RIDGE

KEEP = 0.5
# (tokens, width, layers) of every point.
POINTS: dict[str, list[tuple[int, int, int]]] = {
    "tokens": [(tokens, 256, 4) for tokens in (4_096, 8_192, 16_384, 32_768, 65_536)],
    "width": [(4_096, width, 2) for width in (256, 512, 1_024, 2_048)],
    "layers": [(4_096, 256, layers) for layers in (4, 8, 16, 32)],
}
# Neurons of one layer; a quarter as many outputs.
WIDTHS = (768, 1_536, 3_072, 6_144, 11_008)
VERBS = ("plain", "select", "reconstruct")
HEADINGS = ("grows", "from", "to", "verb", "seconds", "grows with the power")


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came of it."""
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def measure(point: tuple[int, int, int]) -> dict[str, float]:
    """Seconds of the verbs at one point."""
    tokens, width, layers = point
    feed_forward = int(8 / 3 * width) // 32 * 32
    model, batches = random_llama(tokens, width=width, feed_forward=feed_forward, layers=layers, groups=1)
    seconds: dict[str, list[float]] = {verb: [] for verb in VERBS}
    plain(model, batches[:1])
    for _ in range(2):
        seconds["plain"].append(timed(lambda: plain(model, batches))[0])
        took, mask = timed(lambda: liar.select(model, batches, keep=KEEP, progress=False))
        seconds["select"].append(took)
        changed = copy.deepcopy(model)
        took, _ = timed(partial(liar.reconstruct, changed, mask, batches, progress=False))
        seconds["reconstruct"].append(took)
    return {verb: min(values) for verb, values in seconds.items()}


def measure_elimination(width: int) -> dict[str, float]:
    """Seconds and the peak growth of memory for one layer, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_elimination, width).result()


def _elimination(width: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(width)
    gram = torch.zeros(width, width, dtype=torch.float64)
    for _ in range(4):
        rows = torch.randn(width // 2, width, generator=generator, dtype=torch.float64)
        gram.addmm_(rows.T, rows)
    weight = torch.randn(width, width // 4, generator=generator, dtype=torch.float64)
    seconds = [0.0]

    def work() -> None:
        seconds[0], _ = timed(lambda: eliminate(gram, weight, width, RIDGE))

    grown = growth_of_memory(work)
    return {"seconds": seconds[0], "grown_gb": grown / 1e9}


def power(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The exponent of the line through the logarithms, by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def rows(records: Sequence[Record]) -> list[list[str]]:
    """What grows, with which power."""
    lines = []
    for kind, points in POINTS.items():
        runs = [record for record in records if record["kind"] == kind]
        if len(runs) < len(points):
            continue
        sizes = [run[kind] for run in runs]
        for verb in VERBS:
            seconds = [run[verb] for run in runs]
            shown = ", ".join(f"{value:.1f}" for value in seconds)
            lines.append([kind, f"{sizes[0]:,}", f"{sizes[-1]:,}", verb, shown, f"{power(sizes, seconds):.2f}"])
    runs = [record for record in records if record["kind"] == "elimination"]
    if runs:
        sizes, seconds = [run["width"] for run in runs], [run["seconds"] for run in runs]
        shown = ", ".join(f"{run['seconds']:.1f} ({run['grown_gb']:.1f} GB)" for run in runs)
        exponent = f"{power(sizes[-3:], seconds[-3:]):.2f}" if len(runs) >= 3 else ""
        lines.append(["neurons of a layer", f"{sizes[0]:,}", f"{sizes[-1]:,}", "elimination", shown, exponent])
    return lines


def draw(records: Sequence[Record]) -> Figure:
    """Seconds over tokens, width, layers and neurons, on logarithmic axes."""
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    axes = figure.subplots(1, 4)
    for axis, kind in zip(axes, POINTS, strict=False):
        runs = [record for record in records if record["kind"] == kind]
        for verb, marker in zip(VERBS, "osD", strict=True):
            axis.plot([run[kind] for run in runs], [run[verb] for run in runs], marker=marker, markersize=4, label=verb)
        axis.set_xlabel({"width": "hidden size"}.get(kind, kind))
    runs = [record for record in records if record["kind"] == "elimination"]
    seconds = [run["seconds"] for run in runs]
    axes[-1].plot([run["width"] for run in runs], seconds, marker="^", markersize=4, color="C3", label="elimination")
    axes[-1].set_xlabel("neurons of a layer")
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.legend(frameon=False, fontsize=7)
    axes[0].set_ylabel("seconds")
    return figure


def main() -> None:
    """Measure what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*POINTS, "elimination"], nargs="+", default=[*POINTS, "elimination"])
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    file = ResultFile(RESULTS / "growth.jsonl")
    for kind in arguments.only:
        for point in POINTS.get(kind, []):
            key = {"kind": kind, **dict(zip(("tokens", "width", "layers"), point, strict=True))}
            file.get_or_run(key, partial(measure, point))
        for width in WIDTHS if kind == "elimination" else ():
            file.get_or_run({"kind": kind, "width": width}, partial(measure_elimination, width))
    show(HEADINGS, rows(file.records), width=140)


if __name__ == "__main__":
    main()
