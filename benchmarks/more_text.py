"""Whether more calibration text ever makes a repair worse: one mask, repaired with more and more of the same texts.

    python -m benchmarks.more_text --model STORIES260K --data-dir DATA --keep 0.8 0.5 --tokens 4000 16000 64000
    python -m benchmarks.more_text --task wikitext-512-first-16384 --model SMOLLM2 --data-dir DATA --keep 0.8 --tokens 4096 8192

In the grid every number of tokens has a mask of its own, and what changes with it is the work of both. Here the mask is the one
of the largest number. A step is worse if its paired 95 % interval says so (see `paired.py`). Runs that are in
results/more_text.jsonl are skipped; a larger number has another mask, and begins anew.
"""

from __future__ import annotations

import argparse
import copy
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from benchmarks.baselines import RULES
from benchmarks.bench import Bench, SharedInputs
from benchmarks.paired import Gap, resampled
from benchmarks.results import RESULTS, Record, ResultFile, matches, unpacked
from benchmarks.run_keys import Setting, dense_key, grid_file
from benchmarks.summary import DIGITS, LABELS, MORE, show
from benchmarks.tasks import SOURCES, TASKS
from liar.selection import CRITERIA

FILE = RESULTS / "more_text.jsonl"
HEADINGS = (
    *("task", "model", "texts", "masks", "kept", "repair", "tokens", "perplexity or score"),
    *("steps better / level / worse", "from LIAR to dense"),
)
# What all runs of one row share.
GROUP = ("task", "model", "source", "criterion", "keep", "rule", "mask_tokens", "seed")


def measure(rule: str, masked: SharedInputs, tokens: int) -> Record:
    """Scores of the model of one mask, repaired by a rule with so many tokens of the texts."""
    bench = masked.bench
    calibration = SharedInputs(bench, replace(masked.setting, tokens=tokens)).calibration
    model = copy.deepcopy(bench.loaded[0])
    RULES[rule](model, masked.mask, calibration, **masked.options(rule))
    return bench.score(model)


def rows(records: Sequence[Record]) -> list[list[str]]:
    """A row per repair of a mask: the task's number for every number of tokens, and how many of the steps make it worse.

    Beside LIAR's runs, it says how much of the way from LIAR's number to the dense model's another repair goes.
    """
    keys = dict.fromkeys(tuple(record[name] for name in GROUP) for record in records)
    return [_row(dict(zip(GROUP, key, strict=True)), records) for key in keys]


def _row(key: Mapping[str, Any], records: Sequence[Record]) -> list[str]:
    task, model = key["task"], key["model"]
    number = next(iter(TASKS[task].metrics))
    mine = _by_tokens(key, records)
    drawn = [resampled(number, [unpacked(record["per_example"])]) for record in mine.values()]
    verdicts = Counter(Gap.between(more, less).verdict(more=MORE[number]) for less, more in pairwise(drawn))
    others = {} if key["rule"] == "liar" else _by_tokens({**key, "rule": "liar"}, records)
    dense = _dense(RESULTS / "grid", task, model)
    ways = [
        (record[number] - others[tokens][number]) / (dense[number] - others[tokens][number])
        for tokens, record in mine.items()
        if dense is not None and tokens in others
    ]
    return [
        *(task, model, key["source"], key["criterion"], f"{key['keep']:.0%}", LABELS.get(key["rule"], key["rule"])),
        ", ".join(f"{tokens:,}" for tokens in mine),
        ", ".join(f"{record[number]:.{DIGITS.get(number, 4)}f}" for record in mine.values()),
        " / ".join(str(verdicts[verdict]) for verdict in ("ahead", "level", "behind")),
        ", ".join(f"{way:.0%}" for way in ways),
    ]


@cache
def _dense(folder: Path, task: str, model: str) -> Record | None:
    """The dense model's record, if the grid has one."""
    return ResultFile(grid_file(folder, task, model)).find(**dense_key(task, model))


def _by_tokens(key: Mapping[str, Any], records: Sequence[Record]) -> dict[int, Record]:
    """The runs of one row, from the fewest tokens to the most."""
    found = {record["tokens"]: record for record in records if matches(record, key)}
    return dict(sorted(found.items()))


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TASKS), default="tinystories")
    parser.add_argument("--model", help="folder of the model; all-MiniLM-L6-v2 if left out (task stsb)")
    parser.add_argument("--data-dir", type=Path, help="folder of the data; the Hugging Face hub if left out")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8])
    parser.add_argument("--tokens", type=int, nargs="+", required=True)
    parser.add_argument("--sources", choices=list(SOURCES), nargs="+", default=["own", "c4"], help="calibration texts")
    parser.add_argument("--criteria", choices=list(CRITERIA), nargs="+", default=["reconstruction"], help="masks")
    parser.add_argument("--rules", choices=list(RULES), nargs="+", default=["ours"])
    parser.add_argument("--seeds", type=int, default=1, help="samples of the calibration texts")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    bench, file, records = Bench(TASKS[arguments.task], arguments.model, arguments.data_dir), ResultFile(FILE), []
    name = Path(arguments.model).name if arguments.model else "default"
    most = max(arguments.tokens)
    for seed, criterion, source, keep in product(range(arguments.seeds), arguments.criteria, arguments.sources, arguments.keep):
        masked = SharedInputs(bench, Setting(arguments.task, name, criterion, seed, source, keep, most))
        for rule, tokens in product(arguments.rules, sorted(arguments.tokens)):
            values = (arguments.task, name, source, criterion, keep, rule, most, seed)
            key = dict(zip(GROUP, values, strict=True)) | {"tokens": tokens}
            records.append(file.get_or_run(key, partial(measure, rule, masked, tokens)))
    show(HEADINGS, rows(records), width=160)


if __name__ == "__main__":
    main()
