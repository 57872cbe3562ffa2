"""What the grid found, as tables of mean ± standard error: of one grid for the terminal, of all runs for the pages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from math import nan, sqrt
from pathlib import Path
from typing import Any

import pandas
from rich.console import Console
from rich.table import Table

from benchmarks.results import RESULTS, Record, read_records
from benchmarks.run_keys import DENSE
from benchmarks.tasks import TASKS

ROW = ["source", "keep", "tokens"]
SETTING = ["task", "model", "criterion", "seed", *ROW]
COLUMNS = [*SETTING, "rule", "labels", "number", "place", "value", "dense", "chance", "dense_chance"]
LABELS = {
    "mask_only": "mask only",
    "bias": "bias (FLAP)",
    "mask_tuning": "mask tuning",
    "mask_tuning_dense": "mask tuning, dense teacher",
    "liar": "LIAR",
    "grail": "GRAIL",
    "kprune": "K-prune",
    "rcpu": "RCPU",
    "kprune_ridge": "K-prune, ridge",
    "osscar": "OSSCAR",
    "osscar_fullseq": "OSSCAR, fullseq",
    "ours_no_refit": "ours, all of the drift, no refit",
    "ours_residual_stream": "ours, all of the drift",
    "ours": "ours",
    "ours_created_bias": "ours, created biases",
    "fine_tuning": "fine-tuning",
    "kwon": "Kwon et al.",
    "query_heads": "ours, by query head",
    "flap": "FLAP",
    "llm_pruner": "LLM-Pruner",
    "searched": "searched widths",
    "searched_from_ours": "searched, from ours",
}
HEADINGS = {"keep": "kept", "source": "texts"}
# Whether more of a number is better.
MORE = {"seconds": False} | {number: more for task in TASKS.values() for number, more in task.metrics.items()}
DIGITS = {"perplexity": 2, "seconds": 1}
# Standard error of a score over the examples it is taken from: of a share, and of a rank correlation (by way of Fisher's z,
# Bonett and Wright 2000, eq. 3).
CHANCE: dict[str, Callable[[float, int], float]] = {
    "accuracy": lambda share, examples: sqrt(share * (1 - share) / examples),
    "spearman": lambda rho, examples: (1 - rho**2) * sqrt((1 + rho**2 / 2) / (examples - 3)),
}


def tables(runs: Sequence[Mapping[str, Any]], dense: Mapping[str, float], metrics: Mapping[str, bool]) -> list[Table]:
    """One table per metric, a row per (source, keep ratio, tokens) and a column per rule; the best mean is bold.

    Args:
        runs: records of the grid.
        dense: the dense model's numbers; those that only compare with the dense model are not in it.
        metrics: name -> whether more is better.
    """
    frame = pandas.DataFrame(list(runs))
    return [table(frame, name, dense.get(name), more) for name, more in metrics.items()]


def table(frame: pandas.DataFrame, metric: str, dense: float | None, more: bool) -> Table:
    """Mean ± standard error over the seeds; a single seed has none."""
    rules = list(dict.fromkeys(frame["rule"]))
    title = f"{frame['task'].iloc[0]}: {metric} ({'more' if more else 'less'} is better)"
    result = Table(title=title + ("" if dense is None else f", dense {dense:.4f}"))
    for heading in (*ROW, "seeds", *rules):
        result.add_column(heading, justify="right")
    for row, group in frame.groupby(ROW, sort=False):
        shown, seeds = summed(group, metric, more, 4, "[bold]{}[/bold]")
        result.add_row(*map(str, row), seeds, *(shown.get(rule, "") for rule in rules))
    return result


def summed(group: pandas.DataFrame, metric: str, more: bool, digits: int, bold: str) -> tuple[dict[str, str], str]:
    """One row of a table: rule -> text, the best mean in bold (all that have it); and how many seeds there were."""
    means = group.groupby("rule")[metric].agg(["mean", "sem", "count"])
    best = means["mean"].max() if more else means["mean"].min()
    shown = {str(rule): spread(row["mean"], row["sem"], f".{digits}f") for rule, row in means.iterrows()}
    shown |= {str(rule): bold.format(shown[str(rule)]) for rule in means.index[means["mean"] == best]}
    return shown, "-".join(str(number) for number in sorted({int(count) for count in means["count"]}))


def spread(mean: float, error: float, form: str) -> str:
    """A number of a table with its standard error, if there is one."""
    return f"{mean:{form}}" + ("" if pandas.isna(error) else f" ± {error:{form}}")


@cache
def runs(folder: Path = RESULTS / "grid") -> pandas.DataFrame:
    """One row per run and number (with its seconds): coordinates, `number`, its `place` in the task, `value`, `dense`.

    `chance` and `dense_chance` are the standard errors of the two scores over the examples, NaN where none is known; `labels`
    says how labels were sampled for the mask, None where none were. They come in the order of the tables: tasks as they are
    listed, most kept first, fewest tokens first.
    """
    rows = [row for path in sorted(folder.glob("*.jsonl")) for row in _rows(read_records(path))]
    order = list(TASKS)
    rows.sort(key=lambda row: (order.index(row["task"]), -row["keep"], row["tokens"], row["source"], row["place"]))
    return pandas.DataFrame(rows, columns=COLUMNS)


def _rows(records: Sequence[Record]) -> Iterator[Record]:
    """The rows of one task and model."""
    dense = next((record for record in records if record["rule"] == DENSE), Record())
    for run in records:
        if run["rule"] == DENSE:
            continue
        for place, number in enumerate((*TASKS[run["task"]].metrics, "seconds")):
            yield {
                **{name: run[name] for name in (*SETTING, "rule")},
                "labels": run.get("labels"),
                "number": number,
                "place": place,
                "value": run[number],
                "dense": dense.get(number),
                "chance": chance(number, run[number], dense),
                "dense_chance": chance(number, dense[number], dense) if number in dense else nan,
            }


def chance(number: str, score: float, dense: Mapping[str, Any]) -> float:
    """Standard error of a score over the examples; where only that of the dense score is known, the same share of the score."""
    if f"{number}_error" in dense:
        return score * float(dense[f"{number}_error"]) / float(dense[number])
    return CHANCE[number](score, dense["examples"]) if number in CHANCE and "examples" in dense else nan


def with_coordinates_of(frame: pandas.DataFrame, chosen: pandas.Series, coordinates: Sequence[str]) -> pandas.DataFrame:
    """The rows whose coordinates are also those of a chosen row: to compare only what both sides have."""
    return frame.merge(frame.loc[chosen, list(coordinates)].drop_duplicates(), on=list(coordinates))


def common_samples(frame: pandas.DataFrame, rules: Sequence[str]) -> pandas.DataFrame:
    """The runs of these rules; of every comparison only the samples that most rules have had, so that means compare."""
    frame = frame[frame["rule"].isin(rules)]
    comparison = [name for name in SETTING if name != "seed"]
    several = frame.groupby([*comparison, "seed"])["rule"].transform("nunique")
    return frame[several == several.groupby([frame[name] for name in comparison]).transform("max")]


def markdown(frame: pandas.DataFrame, by: Sequence[str], rules: Sequence[str]) -> str:
    """A Markdown table: a row per `by`, a column per rule that was run; empty where there is no run.

    Numbers are means ± standard errors over the samples of the calibration texts, the dense model's over the examples; seconds
    are medians.
    """
    frame = common_samples(frame, rules)
    several = frame.groupby("task")["model"].nunique().gt(1).any()
    by = [*by, "model"] if several else list(by)
    run = set(frame["rule"])
    rules = [rule for rule in rules if rule in run or not run]
    headings = [*(HEADINGS.get(name, name) for name in by), "samples", "dense"]
    rows = []
    for row, group in frame.groupby(by, sort=False):
        number, dense, chance = (group[name].iloc[0] for name in ("number", "dense", "dense_chance"))
        digits = DIGITS.get(number, 3)
        shown, samples = summed(group, "value", MORE[number], digits, "**{}**")
        if number == "seconds":
            shown = {rule: f"{median:.{digits}f}" for rule, median in group.groupby("rule")["value"].median().items()}
        named = (written(name, value) for name, value in zip(by, row, strict=True))
        reference = "" if pandas.isna(dense) else spread(dense, chance, f".{digits}f")
        rows.append([*named, samples, reference, *(shown.get(rule, "") for rule in rules)])
    return lined([*headings, *("**ours**" if rule == "ours" else LABELS.get(rule, rule) for rule in rules)], rows)


def written(name: str, value: Any) -> str:
    """A coordinate for readers."""
    if name == "number":
        return f"{value.replace('_', ' ')} {'↑' if MORE[value] else '↓'}"
    return {"keep": "{:.0%}", "tokens": "{:,}"}.get(name, "{}").format(value)


def show(headings: Sequence[str], rows: Iterable[Sequence[str]], width: int, title: str | None = None) -> None:
    """Print a table, so many characters wide whatever the terminal."""
    table = Table(*headings, title=title)
    for row in rows:
        table.add_row(*row)
    Console(width=width).print(table)


def lined(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (headings, ["---"] * len(headings), *rows))
