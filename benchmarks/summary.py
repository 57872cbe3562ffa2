"""What the ladder found, as tables of mean ± standard error: of one ladder for the terminal, of all runs for the pages."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from functools import cache
from math import nan, sqrt
from pathlib import Path
from typing import Any

import pandas
from numpy import log
from rich.table import Table
from tasks import TASKS

RESULTS = Path(__file__).parent / "results" / "ladder"
CELL = ["source", "keep", "tokens"]
SETTING = ["task", "model", "criterion", "seed", *CELL]
LABELS = {
    "mask_only": "mask only",
    "bias": "bias (FLAP)",
    "mask_tuning": "mask tuning",
    "liar": "LIAR",
    "grail": "GRAIL",
    "kprune": "K-prune",
    "osscar_update": "OSSCAR",
    "ours": "ours",
    "polish": "polish",
    "kwon": "Kwon et al.",
    "dropping": "`drop=True`",
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

# Tasks that are also counted together.
FAMILIES = ("glue-*",)
STANDING = ("best", "within one standard error", "behind by more")


def tables(runs: Sequence[Mapping[str, Any]], dense: Mapping[str, float], metrics: Mapping[str, bool]) -> list[Table]:
    """One table per metric, a row per (source, keep ratio, tokens) and a column per rule; the best mean is bold.

    Args:
        runs: contents of the result files.
        dense: the dense model's numbers; those that only compare with the dense model are not in it.
        metrics: name -> whether more is better.
    """
    frame = pandas.DataFrame(list(runs))
    return [table(frame, name, dense.get(name), more) for name, more in metrics.items()]


def table(frame: pandas.DataFrame, metric: str, dense: float | None, more: bool) -> Table:
    """Mean ± standard error over the seeds; a single seed has none."""
    rules = list(dict.fromkeys(frame["rule"]))
    title = f"{frame['task'].iloc[0]}: {metric} ({'more' if more else 'less'} is better)"
    made = Table(title=title + ("" if dense is None else f", dense {dense:.4f}"))
    for heading in (*CELL, "seeds", *rules):
        made.add_column(heading, justify="right")
    for cell, group in frame.groupby(CELL, sort=False):
        shown, seeds = summed(group, metric, more, 4, "[bold]{}[/bold]")
        made.add_row(*map(str, cell), seeds, *(shown.get(rule, "") for rule in rules))
    return made


def summed(group: pandas.DataFrame, metric: str, more: bool, digits: int, bold: str) -> tuple[dict[str, str], str]:
    """One row of a table: rule -> text, the best mean in bold (all that have it); and how many seeds there were."""
    found = group.groupby("rule")[metric].agg(["mean", "sem", "count"])
    best = found["mean"].max() if more else found["mean"].min()
    shown = {str(rule): spread(row["mean"], row["sem"], f".{digits}f") for rule, row in found.iterrows()}
    shown |= {str(rule): bold.format(shown[str(rule)]) for rule in found.index[found["mean"] == best]}
    return shown, "-".join(str(number) for number in sorted({int(count) for count in found["count"]}))


def spread(mean: float, error: float, form: str) -> str:
    """A cell of a table."""
    return f"{mean:{form}}" + ("" if pandas.isna(error) else f" ± {error:{form}}")


@cache
def runs(folder: Path = RESULTS) -> pandas.DataFrame:
    """One row per run and number (with its seconds): coordinates, `number`, its `place` in the task, `value`, `dense`.

    `chance` and `dense_chance` are the standard errors of the two scores over the examples, NaN where none is known.
    They come in the order of the tables: tasks as they are listed, most kept first, fewest tokens first.
    """
    dense = {path.stem: read(path) for path in folder.glob("*-dense.json")}
    rows = []
    for run in map(read, folder.glob("*-seed*.json")):
        whole = dense.get(f"{run['task']}-{run['model']}-dense", {})
        for place, number in enumerate((*TASKS[run["task"]].metrics, "seconds")):
            rows.append(
                {
                    **{name: run[name] for name in (*SETTING, "rule")},
                    "number": number,
                    "place": place,
                    "value": run[number],
                    "dense": whole.get(number),
                    "chance": chance(number, run[number], whole),
                    "dense_chance": chance(number, whole[number], whole) if number in whole else nan,
                }
            )
    order = list(TASKS)
    rows.sort(key=lambda row: (order.index(row["task"]), -row["keep"], row["tokens"], row["source"], row["place"]))
    return pandas.DataFrame(rows, columns=[*SETTING, "rule", "number", "place", "value", "dense", "chance", "dense_chance"])


def chance(number: str, score: float, dense: Mapping[str, Any]) -> float:
    """Standard error of a score over the examples; where only that of the dense score is known, the same share of the score."""
    if f"{number}_error" in dense:
        return score * float(dense[f"{number}_error"]) / float(dense[number])
    return CHANCE[number](score, dense["examples"]) if number in CHANCE and "examples" in dense else nan


def read(path: Path) -> dict[str, Any]:
    """A result file."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def also(frame: pandas.DataFrame, wanted: pandas.Series, coordinates: Sequence[str]) -> pandas.DataFrame:
    """The rows whose coordinates are also those of a wanted row: to compare only what both sides have."""
    return frame.merge(frame.loc[wanted, list(coordinates)].drop_duplicates(), on=list(coordinates))


def shared(frame: pandas.DataFrame, rules: Sequence[str]) -> pandas.DataFrame:
    """The runs of these rules; of every cell only the samples that most of them have had, so that means compare."""
    frame = frame[frame["rule"].isin(rules)]
    cell = [name for name in SETTING if name != "seed"]
    several = frame.groupby([*cell, "seed"])["rule"].transform("nunique")
    return frame[several == several.groupby([frame[name] for name in cell]).transform("max")]


def standing(frame: pandas.DataFrame, champion: str, others: Sequence[str]) -> str:
    """A Markdown table: in how many cells one rule is best on what the task is about, how far behind elsewhere, and on average.

    A cell is one task, model, selection of masks, kept share, number of tokens and source of texts. The standard error is that
    of the best of the others, over the examples or over the samples of the texts, or that of the champion over the samples:
    whichever is largest. The average is of relative differences, over the cells that all rules have, with its standard error.
    """
    counts: dict[tuple[str, str], Counter[str]] = {}
    means: dict[tuple[str, str], list[pandas.Series]] = {}
    frame = shared(frame[frame["place"] == 0], [champion, *others])
    for coordinates, group in frame.groupby(["task", "source", "model", "criterion", "keep", "tokens"]):
        sign = 1 if MORE[group["number"].iloc[0]] else -1
        mean = sign * group.groupby("rule")["value"].mean()
        rivals = mean.drop(champion, errors="ignore")
        if champion in mean.index and len(rivals):
            behind = rivals.max() - mean[champion]
            spreads = group.groupby("rule")["value"].sem()[[champion, rivals.idxmax()]]
            chances = group.loc[group["rule"] == rivals.idxmax(), "chance"]
            error = max([*spreads.dropna(), *chances.dropna()], default=0.0)
            outcome = STANDING[0] if behind <= 0 else STANDING[1] if behind <= error else STANDING[2]
            task, source, *_ = coordinates
            for name in (task, *(family for family in FAMILIES if fnmatch(task, family))):
                counts.setdefault((name, source), Counter())[outcome] += 1
                means.setdefault((name, source), []).append(sign * log(mean.abs()))
    order = [*TASKS, *FAMILIES]
    rows = [
        [*key, str(count.total()), *(str(count[name]) for name in STANDING), *ahead(pandas.DataFrame(means[key]), champion)]
        for key, count in sorted(counts.items(), key=lambda each: (order.index(each[0][0]), each[0][1] != "own", each[0][1]))
    ]
    return lined(["task", "texts", "cells", *STANDING, "next on average", "ahead of it by"], rows)


def ahead(logs: pandas.DataFrame, champion: str) -> tuple[str, str]:
    """The rule that is next to the champion on average, and how far behind; `logs` has a row per cell, a column per rule."""
    known = logs.dropna()
    gains = (-known.drop(columns=champion).sub(known[champion], axis=0)).agg(["mean", "sem"])
    if gains.isna().loc["mean"].all():
        return "", ""
    name = str(gains.loc["mean"].idxmin())
    mean, error = gains[name]
    return LABELS.get(name, name), spread(mean, error, ".1%")


def markdown(frame: pandas.DataFrame, by: Sequence[str], rules: Sequence[str]) -> str:
    """A Markdown table: a row per `by`, a column per rule; empty where there is no run.

    Numbers are means ± standard errors over the samples of the calibration texts, the dense model's over the examples; seconds
    are medians.
    """
    frame = shared(frame, rules)
    several = frame.groupby("task")["model"].nunique().gt(1).any()
    by = [*by, "model"] if several else list(by)
    headings = [*(HEADINGS.get(name, name) for name in by), "samples", "dense"]
    rows = []
    for cell, group in frame.groupby(by, sort=False):
        number, dense, chance = (group[name].iloc[0] for name in ("number", "dense", "dense_chance"))
        digits = DIGITS.get(number, 3)
        shown, samples = summed(group, "value", MORE[number], digits, "**{}**")
        if number == "seconds":
            shown = {rule: f"{median:.{digits}f}" for rule, median in group.groupby("rule")["value"].median().items()}
        named = (written(name, value) for name, value in zip(by, cell, strict=True))
        whole = "" if pandas.isna(dense) else spread(dense, chance, f".{digits}f")
        rows.append([*named, samples, whole, *(shown.get(rule, "") for rule in rules)])
    return lined([*headings, *("**ours**" if rule == "ours" else LABELS.get(rule, rule) for rule in rules)], rows)


def written(name: str, value: Any) -> str:
    """A coordinate as readers like it."""
    if name == "number":
        return f"{value.replace('_', ' ')} {'↑' if MORE[value] else '↓'}"
    return {"keep": "{:.0%}", "tokens": "{:,}"}.get(name, "{}").format(value)


def lined(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (headings, ["---"] * len(headings), *rows))
