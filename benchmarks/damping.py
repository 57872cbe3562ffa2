"""Whether the rivals' own damping is the best for them: GRAIL's ridge and OSSCAR's damping at several sizes.

    python -m benchmarks.damping --task stsb --data-dir DATA --keep 0.3 --source c4
    python -m benchmarks.damping --task tinystories --model STORIES260K --data-dir DATA --keep 0.8

Masks and tokens are those of the grid, with the default selection. The sizes that the authors ship are marked in the table of
benchmarks/README.md. Runs that are in results/damping.jsonl are skipped.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.baselines import grail, osscar
from benchmarks.baselines.closed_form import repair
from benchmarks.baselines.site_data import Rule
from benchmarks.bench import Bench, SharedInputs
from benchmarks.results import RESULTS, Record, ResultFile
from benchmarks.run_keys import Setting
from benchmarks.summary import LABELS, lined
from benchmarks.tasks import SOURCES, TASKS

SIZES = (1e-4, 1e-3, 1e-2, 1e-1)
OWN = {"grail": grail.RIDGE, "osscar": osscar.DAMPING}
HEADINGS = ("task", "texts", "kept", "rule", "number", *(f"{size:g}" for size in SIZES))
FILE = RESULTS / "damping.jsonl"


def rule(name: str, size: float) -> Rule:
    """A rule with another damping."""
    if name == "grail":
        return Rule(partial(grail.solve, ridge=size), grail.RULE.needs)
    return Rule(partial(osscar.solve, damping=size), osscar.RULE.needs)


def measure(shared: SharedInputs, name: str, size: float) -> Record:
    """The numbers of a model that is repaired so."""
    model = copy.deepcopy(shared.bench.loaded[0])
    repair(model, shared.mask, shared.calibration, rule(name, size))
    return shared.bench.score(model)


def rows(records: list[Record]) -> list[list[str]]:
    """A row per cell and rule, the size that the authors ship in bold."""
    found: dict[tuple[Any, ...], dict[float, Mapping[str, Any]]] = {}
    for record in records:
        key = (record["task"], record["source"], record["keep"], record["rule"])
        found.setdefault(key, {})[record["size"]] = record
    table = []
    for (task, source, keep, name), by_size in found.items():
        number = next(iter(TASKS[task].metrics))
        shown = [f"{by_size[size][number]:.3f}" if size in by_size else "" for size in SIZES]
        shown = [f"**{text}**" if size == OWN[name] else text for size, text in zip(SIZES, shown, strict=True)]
        table.append([task, source, f"{keep:.0%}", LABELS[name], number, *shown])
    return table


def table(records: list[Record]) -> str:
    """Of all runs, in Markdown."""
    return lined(HEADINGS, rows(records))


def main() -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TASKS), required=True)
    parser.add_argument("--model", help="as for benchmarks.grid")
    parser.add_argument("--data-dir", type=Path, help="folder of the data; the Hugging Face hub if left out")
    parser.add_argument("--keep", type=float, required=True)
    parser.add_argument("--source", choices=list(SOURCES), default="own")
    parser.add_argument("--tokens", type=int, default=16_000)
    parser.add_argument("--results", type=Path, default=FILE)
    arguments = parser.parse_args()
    name = Path(arguments.model).name if arguments.model else "default"
    bench = Bench(TASKS[arguments.task], arguments.model, arguments.data_dir)
    setting = Setting(arguments.task, name, "reconstruction", 0, arguments.source, arguments.keep, arguments.tokens)
    shared, file, shown = SharedInputs(bench, setting), ResultFile(arguments.results), Table(*HEADINGS)
    for rule_name in OWN:
        for size in SIZES:
            key = {**vars(setting), "rule": rule_name, "size": size}
            file.get_or_run(key, partial(measure, shared, rule_name, size))
    for row in rows(file.records):
        shown.add_row(*row)
    Console(width=120).print(shown)


if __name__ == "__main__":
    main()
