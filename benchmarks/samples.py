"""What is lost by reading a part of the calibration data: for the mask, and for the refit of the layers before the units.

    python -m benchmarks.samples --task stsb --data-dir DATA --keep 0.3 --tokens 64000 --source c4 --parts selection
    python -m benchmarks.samples --task tinystories --model STORIES260K --data-dir DATA --keep 0.7 0.5 --tokens 16000 --seeds 2

The default criterion reads a sample of at most so many tokens (of so many outputs, where every token has one) and the refit a
sample of its own. Each is set to several sizes while the other reads everything, and the repaired model is scored. Runs that
are in results/samples.jsonl are skipped.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import liar
from benchmarks.bench import Bench, SharedInputs
from benchmarks.results import RESULTS, Record, ResultFile, matches
from benchmarks.run_keys import Setting
from benchmarks.summary import show
from benchmarks.tasks import SOURCES, TASKS

ALL = sys.maxsize
SIZES = {"selection": (2_048, 4_096, 8_192, 16_384, 32_768, ALL), "refit": (8_192, 16_384, 32_768, ALL)}
# The constants that set the sample of each: module, name.
CONSTANTS = {
    "selection": (
        ("liar.selection.fisher", "TOKENS"),
        ("liar.selection.fisher", "OUTPUTS"),
        ("liar.selection.error_curves", "TOKENS"),
    ),
    "refit": (("liar.repair.closed_form", "TOKENS"),),
}
# What asks for more than a sample has, where there are many channels or long sequences.
MORE = (
    ("liar.selection.fisher", "SEQUENCES"),
    ("liar.selection.error_curves", "ROWS"),
    ("liar.repair.closed_form", "ROWS"),
)
HEADINGS = ("task", "texts", "keep", "tokens", "sample of", "its size", "number", "mean", "than with all")


@contextmanager
def constants(values: Mapping[tuple[str, str], int]) -> Iterator[None]:
    """Other values for constants of the library."""
    before = {key: getattr(import_module(key[0]), key[1]) for key in values}
    try:
        for (module, name), value in values.items():
            setattr(import_module(module), name, value)
        yield
    finally:
        for (module, name), value in before.items():
            setattr(import_module(module), name, value)


def measure(bench: Bench, setting: Setting, part: str, size: int) -> dict[str, Any]:
    """Scores of the default with one sample of some size, all else read whole."""
    sizes = {key: size if kind == part else ALL for kind, keys in CONSTANTS.items() for key in keys}
    with constants(sizes | dict.fromkeys(MORE, 0)):
        # Of this size alone: the statistics of another would be reused.
        shared = SharedInputs(Bench(bench.task, bench.folder, bench.data_dir), setting)
        model = copy.deepcopy(bench.loaded[0])
        liar.reconstruct(model, shared.mask, shared.calibration, progress=False)
    return dict(bench.score(model))


def rows(records: Sequence[Record]) -> list[list[str]]:
    """Means over the samples of texts, beside what reading everything gives on the same ones."""
    lines = []
    keys = ("task", "source", "keep", "tokens", "part", "size")
    for key in dict.fromkeys(tuple(record[name] for name in keys) for record in records):
        task, source, keep, tokens, part, size = key
        runs = [record for record in records if tuple(record[name] for name in keys) == key]
        for number in TASKS[task].metrics:
            gains = []
            for run in runs:
                same = dict(zip(keys, key, strict=True)) | {"seed": run["seed"], "size": ALL}
                whole = next((record for record in records if matches(record, same)), None)
                if whole is not None:
                    gains.append(run[number] - whole[number])
            mean = sum(run[number] for run in runs) / len(runs)
            gain = f"{sum(gains) / len(gains):+.4f}" if gains else ""
            label = "all" if size == ALL else f"{size:,}"
            lines.append([task, source, f"{keep:.0%}", f"{tokens:,}", part, label, number, f"{mean:.4f}", gain])
    return lines


def main() -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TASKS), required=True)
    parser.add_argument("--model", help="folder of the model; all-MiniLM-L6-v2 if left out (task stsb)")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--keep", type=float, nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=32_000)
    parser.add_argument("--source", choices=list(SOURCES), default="own", help="calibration texts")
    parser.add_argument("--seeds", type=int, default=1, help="samples of the calibration texts")
    parser.add_argument("--parts", choices=list(SIZES), nargs="+", default=list(SIZES))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    bench = Bench(TASKS[arguments.task], arguments.model, arguments.data_dir)
    name = Path(arguments.model).name if arguments.model else "default"
    file, records = ResultFile(RESULTS / "samples.jsonl"), []
    for seed, keep, part in product(range(arguments.seeds), arguments.keep, arguments.parts):
        for size in SIZES[part]:
            if size != ALL and size >= arguments.tokens:
                continue
            setting = Setting(arguments.task, name, "reconstruction", seed, arguments.source, keep, arguments.tokens)
            names = ("task", "source", "seed", "keep", "tokens")
            key = {name: getattr(setting, name) for name in names} | {"part": part, "size": size}
            records.append(file.get_or_run(key, partial(measure, bench, setting, part, size)))
    show(HEADINGS, rows(records), width=120)


if __name__ == "__main__":
    main()
