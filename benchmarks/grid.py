"""Quality of every rule on identical masks and identical calibration tokens: any task, any cells.

    python -m benchmarks.grid --task stsb --data-dir DATA --keep 0.7 0.5 --tokens 4000 16000 --source own c4
    python -m benchmarks.grid --task tinystories --model STORIES260K --data-dir DATA --keep 0.9 0.8 --plot grid.png

`glue.py`, `squad.py`, `wikitext.py` and `commonsense.py` run the cells that the published tables are made of.

Masks are selected by `--criterion`: a criterion of the library, or a published selection method (see `benchmarks/selections`).
Every run is a line in results/grid/TASK-MODEL.jsonl; runs that are already there are skipped, so a grid that was killed
continues. The mask is selected once per (seed, source, keep, tokens) and serves all rules. Seeds are samples of the calibration
texts; one seed of everything is run before the next.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from benchmarks.baselines import RULES
from benchmarks.bench import Bench, SharedInputs, run_rule
from benchmarks.figures import draw, save
from benchmarks.results import RESULTS, Record, ResultFile, matches
from benchmarks.run_keys import Cells, RunKey, dense_key, grid_file
from benchmarks.selections import SELECTIONS
from benchmarks.summary import tables
from benchmarks.tasks import SOURCES, TASKS, Task
from liar.models import why_unusable

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run_grid(bench: Bench, model: str, plan: Sequence[Cells], file: ResultFile, until: float = inf) -> list[Record]:
    """Run what is missing of a plan; the records of all runs that it asks for and that are there by then.

    Args:
        bench: the dense model of a task.
        model: its name in the file.
        plan: cells, the most important ones first.
        file: where the runs are.
        until: no run begins after this time (of `time.monotonic`).
    """
    groups = [group for cells in plan for group in cells.groups(bench.task.name, model)]
    missing = sum(file.find(**key.entries()) is None for group in groups for key in group)
    records = []
    with logging_redirect_tqdm(), tqdm(total=missing, desc=bench.task.name, unit="run", smoothing=0.1) as bar:
        for group in groups:
            check_mask(file, group, bench.device)
            shared = SharedInputs(bench, group[0].setting)
            for key in group:
                if time.monotonic() > until and file.find(**key.entries()) is None:
                    continue
                bar.set_postfix_str(" ".join(map(str, key.entries().values())))
                known = len(file.records)
                records.append(file.get_or_run(key.entries(), partial(run_rule, key, shared)))
                bar.update(len(file.records) - known)
    return records


def check_mask(file: ResultFile, group: Sequence[RunKey], device: str) -> None:
    """Stop where a rule would be added to a setting whose other rules have another mask.

    Such are masks from the former label sampling, and those that another device selected, which rounds differently.
    """
    setting = asdict(group[0].setting)
    if all(file.find(**key.entries()) for key in group):
        return
    for record in (record for record in file.records if matches(record, setting)):
        if record.get("labels") == "by batch":
            reason = "have a mask that is selected differently today (labels: by batch)"
        elif (other := record.get("device", "cpu")) != device:
            reason = f"have a mask that was selected on the device {other}, not on {device}"
        else:
            continue
        raise SystemExit(f"{file.path}: the runs of {setting} {reason}; remove their lines, and all rules are run again")


def usable_device(name: str) -> str:
    """The name of a device that torch can use here."""
    if reason := why_unusable(name):
        raise argparse.ArgumentTypeError(f"torch cannot use {name!r} here: {reason}")
    return name


def parser(description: str | None, tasks: Iterable[str], default: Sequence[str] = ()) -> argparse.ArgumentParser:
    """A command line that says which tasks, model and data, and where the results are."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    shown = f"; {' '.join(default)} if left out" if default else ""
    made.add_argument(
        "--task", choices=list(tasks), nargs="+", required=not default, default=default, help=f"one or more{shown}"
    )
    made.add_argument(
        "--model",
        help="folder of the model, or name on the hub; {task} in it stands for the task's name. all-MiniLM-L6-v2 from its "
        "package if left out, for tasks that take a sentence encoder",
    )
    made.add_argument("--data-dir", type=Path, help="folder of the data; the Hugging Face hub if left out")
    made.add_argument("--device", type=usable_device, default="cpu", help="where everything runs, such as cuda")
    made.add_argument(
        "--dtype",
        choices=list(DTYPES),
        help="of the weights, and part of the model's name in the results; as they were saved if left out",
    )
    made.add_argument("--results", type=Path, default=RESULTS / "grid", help="folder of the JSON lines")
    made.add_argument("--hours", type=float, default=inf, help="begin no run after so many hours; call again to go on")
    made.add_argument("--plot", type=Path, help="figure to draw")
    return made


def run(arguments: argparse.Namespace, task: Task, plan: Sequence[Cells]) -> None:
    """Run what is missing of a plan, print the tables, draw the figure."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    until = time.monotonic() + 3600 * arguments.hours
    folder = arguments.model and arguments.model.format(task=task.name.removeprefix("glue-"))
    name = (Path(folder).name if folder else "default") + (f"-{arguments.dtype}" if arguments.dtype else "")
    bench = Bench(task, folder, arguments.data_dir, arguments.device, DTYPES.get(arguments.dtype))
    file = ResultFile(grid_file(arguments.results, task.name, name))
    dense: dict[str, Any] = file.get_or_run(dense_key(task.name, name), lambda: bench.score(bench.loaded[0]))
    records = run_grid(bench, name, plan, file, until)
    if not records:
        return
    console = Console(width=60 + max(88, 20 * len({record["rule"] for record in records})))
    for table in tables(records, dense, task.metrics):
        console.print(table)
    if arguments.plot:
        save(draw(records, dense, next(iter(task.metrics))), arguments.plot)


def command(description: str | None, tasks: Mapping[str, Task], plan: Sequence[Cells], default: Sequence[str]) -> None:
    """A command that runs a plan, or the part of it that is asked for."""
    made = parser(description, tasks, default)
    made.add_argument("--keep", type=float, nargs="+", help="of the plan only these shares of the block parameters")
    made.add_argument("--rules", choices=list(RULES), nargs="+", help="of the plan only these rules")
    made.add_argument("--criterion", choices=list(SELECTIONS), nargs="+", help="of the plan only these masks")
    made.add_argument("--source", choices=list(SOURCES), nargs="+", help="of the plan only these calibration texts")
    made.add_argument("--tokens", type=int, nargs="+", help="calibration tokens, instead of the plan's")
    arguments = made.parse_args()
    part = [
        replace(
            cells.only(rules=arguments.rules, keeps=arguments.keep, sources=arguments.source),
            tokens=arguments.tokens or cells.tokens,
        )
        for cells in plan
        if arguments.criterion is None or cells.criterion in arguments.criterion
    ]
    if not any(list(cells.groups("", "")) for cells in part):
        made.error("the plan has no such cells; benchmarks.grid runs any")
    for name in arguments.task:
        run(arguments, tasks[name], part)


def main() -> None:
    """Run the cells of the command line."""
    made = parser(__doc__, TASKS)
    made.add_argument("--keep", type=float, nargs="+", required=True, help="shares of the block parameters that stay")
    made.add_argument("--tokens", type=int, nargs="+", default=[16_000])
    made.add_argument("--source", choices=list(SOURCES), nargs="+", default=["own"], help="calibration texts")
    made.add_argument("--criterion", choices=list(SELECTIONS), default="fluctuation", help="what selects the mask")
    made.add_argument("--seeds", type=int, default=3, help="samples of the calibration texts")
    made.add_argument("--rules", choices=list(RULES), nargs="+", default=list(RULES))
    arguments = made.parse_args()
    cells = Cells(
        arguments.criterion,
        tuple(arguments.rules),
        keeps=tuple(arguments.keep),
        sources=tuple(arguments.source),
        tokens=tuple(arguments.tokens),
        seeds=range(arguments.seeds),
    )
    for name in arguments.task:
        run(arguments, TASKS[name], [cells])


if __name__ == "__main__":
    main()
