"""Quality of every rule on identical masks and identical calibration tokens.

    python benchmarks/ladder.py --task stsb --data-dir DATA --keep 0.7 0.5 --tokens 4000 16000 --source own c4
    python benchmarks/ladder.py --task glue-sst2 --model SST2 --data-dir DATA --keep 0.5 --rules mask_only liar ours
    python benchmarks/ladder.py --task tinystories --model STORIES260K --data-dir DATA --keep 0.9 0.8 --plot ladder.png

Masks are those of `--criterion`: a criterion of the library, or a whole selection of others (see selections/).

One JSON per run in benchmarks/results/ladder; runs that are already there are skipped, so a killed ladder goes on. The mask is
selected once per (seed, source, keep, tokens) and serves all rules. Seeds are samples of the calibration texts; one seed of
everything is run before the next.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench import Bench, Shared, run
from cells import Cell, Setting, settings
from figures import draw
from results import kept
from rich.console import Console
from rivals import RULES
from selections import SELECTIONS
from summary import tables
from tasks import SOURCES, TASKS
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

RESULTS = Path(__file__).parent / "results" / "ladder"


def climb(bench: Bench, wanted: Sequence[Setting], rules: Sequence[str], results: Path) -> list[dict[str, Any]]:
    """Run what is missing; the contents of all files that were asked for."""
    cells = [[Cell(setting, rule) for rule in rules] for setting in wanted]
    missing = sum(not cell.path(results).exists() for group in cells for cell in group)
    found = []
    with logging_redirect_tqdm(), tqdm(total=missing, desc="ladder", unit="run", smoothing=0.1) as bar:
        for group in cells:
            shared = Shared(bench, group[0].setting)
            for cell in group:
                path = cell.path(results)
                bar.set_postfix_str(path.stem)
                new = not path.exists()
                found.append(kept(path, partial(run, cell, shared)) if new else json.loads(path.read_text(encoding="utf-8")))
                bar.update(new)
    return found


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
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--plot", type=Path, help="figure to draw")
    return parser.parse_args()


def main() -> None:
    """Run what is missing, print the tables, draw the figure."""
    arguments = parsed()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    task = TASKS[arguments.task]
    name = Path(arguments.model).name if arguments.model else "default"
    bench = Bench(task, arguments.model, arguments.data_dir)
    wanted = list(
        settings(
            task.name,
            name,
            arguments.criterion,
            seeds=arguments.seeds,
            sources=arguments.source,
            keeps=arguments.keep,
            tokens=arguments.tokens,
        )
    )
    dense = kept(arguments.results / f"{task.name}-{name}-dense.json", lambda: bench.score(bench.loaded[0]))
    runs = climb(bench, wanted, arguments.rules, arguments.results)
    console = Console(width=40 + max(88, 20 * len(arguments.rules)))
    for table in tables(runs, dense, task.metrics):
        console.print(table)
    if arguments.plot:
        draw(runs, dense, next(iter(task.metrics)), arguments.plot)


if __name__ == "__main__":
    main()
