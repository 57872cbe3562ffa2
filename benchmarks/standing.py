"""Which rule is ahead of which on the same examples, cell by cell, from paired bootstrap intervals (see `paired.py`).

A cell is one task, model, selection of masks, kept share, number of tokens and source of texts. It counts if every rule has
been run there on the same samples of the texts, with what each said on every example. Comparisons of a cell are computed once
and kept in results/standing.jsonl, under a checksum of what they rest on.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas

from benchmarks.paired import Gap, resampled
from benchmarks.results import RESULTS, Record, ResultFile, read_records, unpacked
from benchmarks.run_keys import DENSE, SELECTED
from benchmarks.summary import LABELS, MORE, lined, written
from benchmarks.tasks import TASKS

CELL = ("task", "model", "criterion", "keep", "source", "tokens")
FILE = RESULTS / "standing.jsonl"
VERDICTS = ("ahead", "level", "behind")


def compared(rules: Sequence[str], file: Path = FILE, folder: Path = RESULTS / "grid", by: str = "rule") -> pandas.DataFrame:
    """All comparisons of two rules in all complete cells: the cell, `one`, `other`, `difference`, `low`, `high`, `verdict`.

    Args:
        rules: that a cell must have.
        file: where comparisons are kept.
        folder: of the runs.
        by: what is compared: the rules, or, as "criterion", the selections, each followed by one reconstruction.
    """
    kept, found = ResultFile(file), []
    records = [record for path in sorted(folder.glob("*.jsonl")) for record in read_records(path)]
    usable = [record for record in records if "per_example" in record and record["rule"] != DENSE]
    if by == "criterion":
        usable = [{**each, "rule": each["criterion"], "criterion": "all"} for each in usable if each["rule"] == SELECTED]
    for cell, samples in _complete(usable, rules):
        digest = zlib.crc32("".join(each["per_example"]["zlib"] for rule in rules for each in samples[rule]).encode())
        record = kept.get_or_run({**cell, "rules": list(rules), "checksum": digest}, partial(_compare, cell, samples))
        for gap in record["gaps"]:
            found.append({**cell, **gap})
    frame = pandas.DataFrame(found, columns=[*CELL, "one", "other", "difference", "low", "high", "verdict"])
    return pandas.concat([frame, mirrored(frame)], ignore_index=True)


def mirrored(frame: pandas.DataFrame) -> pandas.DataFrame:
    """The same comparisons seen from the other side."""
    turned = frame.rename(columns={"one": "other", "other": "one", "low": "high", "high": "low"})
    turned[["difference", "low", "high"]] *= -1
    return turned.assign(verdict=turned["verdict"].map(dict(zip(VERDICTS, VERDICTS[::-1], strict=True))))


def _complete(records: Sequence[Record], rules: Sequence[str]) -> Iterator[tuple[Record, dict[str, list[Record]]]]:
    """The cells that have all rules, with the records of each rule for the samples that all of them have."""
    cells: dict[tuple[Any, ...], dict[str, dict[int, Record]]] = {}
    for record in records:
        by_rule = cells.setdefault(tuple(record[name] for name in CELL), {})
        by_rule.setdefault(record["rule"], {})[record["seed"]] = record
    for values, by_rule in cells.items():
        common = set.intersection(*(set(by_rule.get(rule, ())) for rule in rules))
        if common:
            yield (
                dict(zip(CELL, values, strict=True)),
                {rule: [by_rule[rule][seed] for seed in sorted(common)] for rule in rules},
            )


def _compare(cell: Mapping[str, Any], samples: Mapping[str, Sequence[Record]]) -> Record:
    number = next(iter(TASKS[cell["task"]].metrics))
    values = {rule: resampled(number, [unpacked(each["per_example"]) for each in runs]) for rule, runs in samples.items()}
    gaps = []
    for one, other in combinations(values, 2):
        gap = Gap.between(values[one], values[other])
        gaps.append({"one": one, "other": other, **asdict(gap), "verdict": gap.verdict(more=MORE[number])})
    return {"number": number, "samples": len(next(iter(samples.values()))), "gaps": gaps}


def table(frame: pandas.DataFrame, champion: str) -> str:
    """How often each rule is ahead of, level with and behind the champion, and all others together."""
    rows = []
    for rule, part in frame.groupby("one", sort=False):
        counts = [_counts(part[part["other"] == champion]) if rule != champion else [""] * 3, _counts(part)]
        cells = str(part[list(CELL)].drop_duplicates().shape[0])
        rows.append([f"**{rule}**" if rule == champion else LABELS.get(str(rule), str(rule)), cells, *counts[0], *counts[1]])
    against = [f"{verdict} of {champion}" if verdict == "ahead" else f"{verdict} it" for verdict in VERDICTS]
    return lined(["rule", "cells", *against, *(f"{verdict}, all pairs" for verdict in VERDICTS)], rows)


def _counts(part: pandas.DataFrame) -> list[str]:
    return [str(int((part["verdict"] == verdict).sum())) for verdict in VERDICTS]


def by_task(frame: pandas.DataFrame, champion: str) -> str:
    """By task and texts: in how many cells the champion is ahead of all, level with the best, behind somebody; and pairs."""
    mine, order, rows = frame[frame["one"] == champion], list(TASKS), []
    groups = dict(list(mine.groupby(["task", "source"])))
    for task, source in sorted(groups, key=lambda name: (order.index(name[0]), name[1] != "own", name[1])):
        part = groups[task, source]
        worst = part.groupby(list(CELL))["verdict"].agg(lambda verdicts: max(verdicts, key=VERDICTS.index))
        cells = [str(int((worst == verdict).sum())) for verdict in VERDICTS]
        rows.append([task, source, str(len(worst)), *cells, *_counts(part)])
    ends = ("ahead of all", "level with the best", "behind one or more")
    return lined(["task", "texts", "cells", *ends, *(f"pairs {verdict}" for verdict in VERDICTS)], rows)


def behind(frame: pandas.DataFrame, champion: str) -> str:
    """Every comparison that the champion loses."""
    lost = frame[(frame["one"] == champion) & (frame["verdict"] == "behind")]
    rows = [
        [
            str(row["task"]), str(row["source"]), written("keep", row["keep"]), written("tokens", row["tokens"]),
            LABELS.get(row["other"], row["other"]), f"{row['difference']:+.4f}", f"{row['low']:+.4f} to {row['high']:+.4f}",
        ]
        for row in lost.to_dict("records")
    ]  # fmt: skip
    return lined(["task", "texts", "kept", "tokens", "behind", "by", "95% interval"], rows)
