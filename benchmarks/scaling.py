"""How time and memory grow with tokens and layers, by where activations and weights are kept.

    python -m benchmarks.scaling [--only tokens layers] [--largest 262144]

Random LLaMAs of hidden size 256, pruned to half by `liar.prune`, all layers to the same widths, so that the widest site is as
wide in all of them. Every run is in a process of its own. Its memory is the peak of its own pages, the model included, over
what the process had before the model was loaded; tensors are mapped by themselves, as large ones are on the command line. Pages
of files that are mapped are counted apart: the system takes them back when memory is short, see `benchmarks.offload`. Runs that
are in results/scaling.jsonl are skipped; `benchmarks.publish` draws docs/images/scaling.png from them.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import logging
import multiprocessing
import resource
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from transformers import AutoModel

import liar
from benchmarks.growth import power
from benchmarks.results import RESULTS, Record, ResultFile, read_records
from benchmarks.speed import growth_of_memory, random_llama
from benchmarks.summary import lined
from liar.cli.memory import map_large_tensors

FILE = RESULTS / "scaling.jsonl"
KEEP, WIDTH = 0.5, 256
# Bytes of blocks that the C library maps by themselves: most weights of these models are smaller than a megabyte.
LARGER_THAN = 2**16
# Name -> where activations are, whether blocks are on disk before, meanwhile and afterwards, and the criterion.
WAYS: dict[str, tuple[str, bool, str]] = {
    "in memory": ("device", False, "reconstruction"),
    "activations on disk": ("disk", False, "reconstruction"),
    "activations and blocks on disk": ("disk", True, "reconstruction"),
    "the same, criterion without gradients": ("disk", True, "fluctuation"),
}
# What grows -> (tokens, layers) of every run.
POINTS: dict[str, list[tuple[int, int]]] = {
    "tokens": [(tokens, 4) for tokens in (4_096, 16_384, 65_536, 262_144)],
    "layers": [(4_096, layers) for layers in (4, 8, 16, 32)],
}
HEADINGS = ("grows", "from", "to", "kept", "seconds", "with the power", "MB", "last over first", "MB with mapped files")


def measure(tokens: int, layers: int, way: str) -> dict[str, float]:
    """Seconds and the peak of memory of one run, in a process of its own; the model was made and saved by another."""
    with tempfile.TemporaryDirectory() as folder:
        for work in (_save, _measure):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                result = pool.submit(work, Path(folder), tokens, layers, way).result()
    assert result is not None
    return result


def _llama(tokens: int, layers: int) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """A random model and its calibration batches."""
    size: dict[str, Any] = {"width": WIDTH, "feed_forward": int(8 / 3 * WIDTH) // 32 * 32, "groups": 1}
    return random_llama(tokens, layers=layers, **size)


def _save(folder: Path, tokens: int, layers: int, _way: str) -> None:
    model, batches = _llama(tokens, layers)
    model.save_pretrained(folder / "model")
    torch.save(batches, folder / "batches.pt")


def _measure(folder: Path, _tokens: int, _layers: int, way: str) -> dict[str, float]:
    map_large_tensors(LARGER_THAN)
    activations, on_disk, criterion = WAYS[way]
    batches = torch.load(folder / "batches.pt")
    # What the first pass allocates for good is not counted.
    small, few = _llama(len(batches[0]["input_ids"].flatten()), 1)
    liar.prune(small, few, keep=KEEP, progress=False)
    del small, few
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    where = {"device_map": {"": "disk"}, "offload_folder": folder / "offload"} if on_disk else {}
    options: dict[str, Any] = {
        "criterion": criterion,
        "widths": "balanced",
        "activations": activations,
        "run_folder": folder / "run" if on_disk else None,
    }
    seconds = 0.0

    def work() -> None:
        nonlocal seconds
        loaded = AutoModel.from_pretrained(folder / "model", **where)
        began = time.perf_counter()
        liar.prune(loaded, batches, keep=KEEP, progress=False, **options)
        seconds = time.perf_counter() - began

    with PeakOfOwnPages() as peak:
        grown = growth_of_memory(work)
    return {"seconds": seconds, "grown_mb": peak.grown / 1e6, "with_files_mb": grown / 1e6}


class PeakOfOwnPages(AbstractContextManager["PeakOfOwnPages"]):
    """By how many bytes a process's own pages, not those of mapped files, exceed what they were.

    Linux; it is looked at every few milliseconds.

    Attributes:
        grown: so far.
    """

    PERIOD = 0.002

    def __init__(self) -> None:
        self.grown = 0
        self._before = self._now()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakOfOwnPages:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(self.PERIOD):
            self.grown = max(self.grown, self._now() - self._before)

    @staticmethod
    def _now() -> int:
        _, resident, of_files, *_ = map(int, Path("/proc/self/statm").read_text(encoding="ascii").split())
        return (resident - of_files) * resource.getpagesize()


def rows(records: Sequence[Record]) -> list[list[str]]:
    """A row per thing that grows and way."""
    lines = []
    for (kind, points), way in product(POINTS.items(), WAYS):
        runs = [record for record in records if (record["kind"], record["way"]) == (kind, way)]
        if len(runs) < 2:
            continue
        sizes, seconds, memory = ([run[name] for run in runs] for name in (kind, "seconds", "grown_mb"))
        mapped = [run["with_files_mb"] for run in runs]
        listed = [
            ", ".join(f"{value:,.{digits}f}" for value in values) for values, digits in ((seconds, 1), (memory, 0), (mapped, 0))
        ]
        ends = f"{sizes[0]:,}", f"{sizes[-1]:,}"
        grown = f"{memory[-1] / memory[0]:.1f}"
        lines.append([kind, *ends, way, listed[0], f"{power(sizes, seconds):.2f}", listed[1], grown, listed[2]])
        assert len(runs) <= len(points)
    return lines


def table() -> str:
    """The same for the docs."""
    return lined(HEADINGS, rows(read_records(FILE)))


def draw() -> Figure:
    """Seconds and memory over tokens and layers, a line for each way."""
    records = read_records(FILE)
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    grid = figure.subplots(2, 2, squeeze=False)
    for column, kind in enumerate(POINTS):
        for line, (name, title) in enumerate((("seconds", "seconds"), ("grown_mb", "peak memory, MB"))):
            axes = grid[line][column]
            for way, marker in zip(WAYS, "os^D", strict=True):
                runs = [record for record in records if (record["kind"], record["way"]) == (kind, way)]
                axes.plot([run[kind] for run in runs], [run[name] for run in runs], marker=marker, markersize=4, label=way)
            axes.set(xlabel=kind, ylabel=title, xscale="log", yscale="log" if name == "seconds" else "linear")
            axes.set_xscale("log", base=2)
            axes.set_ylim(bottom=None if name == "seconds" else 0)
            axes.grid(alpha=0.3)
    grid[0][0].legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    """Measure what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(POINTS), nargs="+", default=list(POINTS))
    parser.add_argument("--largest", type=int, default=262_144, help="no more tokens than these")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    file = ResultFile(FILE)
    for kind in arguments.only:
        for (tokens, layers), way in product(POINTS[kind], WAYS):
            if tokens <= arguments.largest:
                key = {"kind": kind, "tokens": tokens, "layers": layers, "way": way}
                file.get_or_run(key, partial(measure, tokens, layers, way))
    table_shown = Table(*HEADINGS)
    for line in rows(file.records):
        table_shown.add_row(*line)
    Console(width=160).print(table_shown)


if __name__ == "__main__":
    main()
