"""What the ladder found: tables of mean ± standard error, and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

CELL = ["source", "keep", "tokens"]


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
        found = group.groupby("rule")[metric].agg(["mean", "sem", "count"])
        best = found["mean"].idxmax() if more else found["mean"].idxmin()
        shown = {rule: spread(row["mean"], row["sem"], bold=rule == best) for rule, row in found.iterrows()}
        seeds = "-".join(str(number) for number in sorted({int(count) for count in found["count"]}))
        made.add_row(*map(str, cell), seeds, *(shown.get(rule, "") for rule in rules))
    return made


def spread(mean: float, error: float, *, bold: bool) -> str:
    """A cell of the table."""
    text = f"{mean:.4f}" + ("" if pandas.isna(error) else f" ± {error:.4f}")
    return f"[bold]{text}[/bold]" if bold else text


def draw(runs: Sequence[Mapping[str, Any]], dense: Mapping[str, float], metric: str, file: Path) -> None:
    """The first metric against the keep ratio (at most tokens) and against the tokens (at the smallest ratio), per source."""
    frame = pandas.DataFrame(list(runs))
    sources = list(dict.fromkeys(frame["source"]))
    figure = Figure(figsize=(11, 4 * len(sources)), layout="constrained")
    for row, source in zip(figure.subplots(len(sources), 2, squeeze=False), sources, strict=True):
        part = frame[frame["source"] == source]
        most, least = part["tokens"].max(), part["keep"].min()
        lines(row[0], part[part["tokens"] == most], "keep", metric)
        row[0].set(title=f"{source} texts, {most:,} tokens", xlabel="share of block parameters kept", ylabel=metric)
        row[0].invert_xaxis()
        lines(row[1], part[part["keep"] == least], "tokens", metric)
        row[1].set(title=f"{source} texts, {least:.0%} kept", xlabel="calibration tokens", ylabel=metric, xscale="log")
        for axes in row:
            axes.axhline(dense[metric], color="black", linestyle=":", label="dense")
            axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def lines(axes: Axes, frame: pandas.DataFrame, along: str, metric: str) -> None:
    """A line with standard errors per rule."""
    for rule, group in frame.groupby("rule", sort=False):
        found = group.groupby(along)[metric].agg(["mean", "sem"])
        axes.errorbar(found.index, found["mean"], found["sem"].fillna(0), marker="o", capsize=3, label=rule)
