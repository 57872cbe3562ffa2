"""Quality of every rule on identical masks and identical calibration tokens.

    python -m benchmarks.grid --task stsb --data-dir DATA --keep 0.7 0.5 --tokens 4000 16000 --source own c4
    python -m benchmarks.grid --task glue-sst2 --model SST2 --data-dir DATA --keep 0.5 --rules mask_only liar ours
    python -m benchmarks.grid --task tinystories --model STORIES260K --data-dir DATA --keep 0.9 0.8 --plot grid.png

Masks are selected by `--criterion`: a criterion of the library, or a published selection method (see `benchmarks/selections`).

Every run is a line in results/grid/TASK-MODEL.jsonl; runs that are already there are skipped, so a grid that was killed
continues. The mask is selected once per (seed, source, keep, tokens) and serves all rules. Seeds are samples of the calibration
texts; one seed of everything is run before the next.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from benchmarks.baselines import RULES
from benchmarks.bench import Bench, SharedInputs, run_rule
from benchmarks.figures import draw
from benchmarks.results import RESULTS, Record, ResultFile
from benchmarks.run_keys import RunKey, Setting, dense_key, grid_file, settings
from benchmarks.selections import SELECTIONS
from benchmarks.summary import tables
from benchmarks.tasks import SOURCES, TASKS


def run_grid(bench: Bench, chosen: Sequence[Setting], rules: Sequence[str], file: ResultFile) -> list[Record]:
    """Run what is missing; the records of all runs that were asked for."""
    groups = [[RunKey(setting, rule) for rule in rules] for setting in chosen]
    missing = sum(file.find(**key.entries()) is None for group in groups for key in group)
    records = []
    with logging_redirect_tqdm(), tqdm(total=missing, desc="grid", unit="run", smoothing=0.1) as bar:
        for group in groups:
            check_mask(file, group)
            shared = SharedInputs(bench, group[0].setting)
            for key in group:
                bar.set_postfix_str(" ".join(map(str, key.entries().values())))
                known = len(file.records)
                records.append(file.get_or_run(key.entries(), partial(run_rule, key, shared)))
                bar.update(len(file.records) - known)
    return records


def check_mask(file: ResultFile, group: Sequence[RunKey]) -> None:
    """Stop where a rule would be added to a setting whose mask came from the former label sampling: it would get another."""
    setting = asdict(group[0].setting)
    if file.find(**setting, labels="by batch") and any(file.find(**key.entries()) is None for key in group):
        raise SystemExit(
            f"{file.path}: the runs of {setting} have a mask that is selected differently today (labels: by batch); remove "
            "their lines, and all rules are run again"
        )


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TASKS), required=True)
    parser.add_argument("--model", help="folder of the model; all-MiniLM-L6-v2 from its package if left out (task stsb)")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--keep", type=float, nargs="+", required=True, help="shares of the block parameters that stay")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16_000])
    parser.add_argument("--source", choices=list(SOURCES), nargs="+", default=["own"], help="calibration texts")
    parser.add_argument("--criterion", choices=list(SELECTIONS), default="fluctuation", help="what selects the mask")
    parser.add_argument("--seeds", type=int, default=3, help="samples of the calibration texts")
    parser.add_argument("--rules", choices=list(RULES), nargs="+", default=list(RULES))
    parser.add_argument("--results", type=Path, default=RESULTS / "grid", help="folder of the JSON lines")
    parser.add_argument("--plot", type=Path, help="figure to draw")
    return parser.parse_args()


def chosen_settings(arguments: argparse.Namespace, model: str) -> list[Setting]:
    """The settings that the command line asks for."""
    return list(
        settings(
            arguments.task,
            model,
            arguments.criterion,
            seeds=arguments.seeds,
            sources=arguments.source,
            keeps=arguments.keep,
            tokens=arguments.tokens,
        )
    )


def main() -> None:
    """Run what is missing, print the tables, draw the figure."""
    arguments = parsed()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    task = TASKS[arguments.task]
    name = Path(arguments.model).name if arguments.model else "default"
    bench = Bench(task, arguments.model, arguments.data_dir)
    file = ResultFile(grid_file(arguments.results, task.name, name))
    dense: dict[str, Any] = file.get_or_run(dense_key(task.name, name), lambda: bench.score(bench.loaded[0]))
    records = run_grid(bench, chosen_settings(arguments, name), arguments.rules, file)
    console = Console(width=40 + max(88, 20 * len(arguments.rules)))
    for table in tables(records, dense, task.metrics):
        console.print(table)
    if arguments.plot:
        draw(records, dense, next(iter(task.metrics)), arguments.plot)


if __name__ == "__main__":
    main()
