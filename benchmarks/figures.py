"""Figures: a line with standard errors per rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

from benchmarks.summary import LABELS
from benchmarks.tasks import TASKS

TITLES = {"stsb": "BERT encoder: all-MiniLM-L6-v2 on STS-B", "tinystories": "LLaMA: stories260K on TinyStories"}
AXES = {"keep": "share of block parameters kept", "tokens": "calibration tokens"}
# The lines of the defaults are in front.
OURS = ("ours", "reconstruction")
FRONT = {"color": "black", "linewidth": 2.5, "markersize": 7, "zorder": 5}
OTHERS = {"linewidth": 1.2, "markersize": 4, "alpha": 0.8}


def draw(runs: Sequence[Mapping[str, Any]], dense: Mapping[str, float], metric: str, file: Path) -> None:
    """The first metric against the keep ratio (at most tokens) and against the tokens (at the smallest ratio), per source."""
    frame = pandas.DataFrame(list(runs))
    sources = list(dict.fromkeys(frame["source"]))
    figure = Figure(figsize=(11, 4 * len(sources)), layout="constrained")
    for row, source in zip(figure.subplots(len(sources), 2, squeeze=False), sources, strict=True):
        part = frame[frame["source"] == source]
        most, least = part["tokens"].max(), part["keep"].min()
        lines(row[0], part[part["tokens"] == most], "keep", metric)
        row[0].set(title=f"{source} texts, {most:,} tokens", xlabel=AXES["keep"], ylabel=metric)
        row[0].invert_xaxis()
        lines(row[1], part[part["keep"] == least], "tokens", metric)
        row[1].set(title=f"{source} texts, {least:.0%} kept", xlabel=AXES["tokens"], ylabel=metric, xscale="log")
        for axes in row:
            axes.axhline(dense[metric], color="black", linestyle=":", label="dense")
            axes.grid(alpha=0.3)
    save(figure, file)


def published(parts: Mapping[str, pandas.DataFrame], along: str, rules: Sequence[str], file: Path) -> None:
    """What each task is about, against the kept share or the tokens: {task: rows of `summary.runs`}."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, (task, part) in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts.items(), strict=True):
        metric, more = next(iter(TASKS[task].metrics.items()))
        lines(axes, part[part["rule"].isin(rules)], along, "value", rules)
        for dense in part["dense"].dropna().unique()[:1]:
            axes.axhline(dense, color="black", linestyle=":", label="dense")
        axes.set(title=TITLES.get(task, task), xlabel=AXES[along], ylabel=f"{metric} ({'more' if more else 'less'} is better)")
        if metric == "perplexity":
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter("{x:g}")
        ticks(axes, along, sorted(part[along].unique()))
        axes.grid(alpha=0.3)
    save(figure, file)


def lines(axes: Axes, frame: pandas.DataFrame, along: str, metric: str, rules: Sequence[str] = ()) -> None:
    """A line with standard errors per rule (or selection): all as they come, or those named, the default in front."""
    for rule in rules or dict.fromkeys(frame["rule"]):
        means = frame[frame["rule"] == rule].groupby(along)[metric].agg(["mean", "sem"])
        style: dict[str, Any] = (FRONT if rule in OURS else OTHERS) if rules else {}
        label = LABELS.get(rule, rule) if rules else rule
        axes.errorbar(means.index, means["mean"], means["sem"].fillna(0), marker="o", capsize=3, label=label, **style)


def ticks(axes: Axes, along: str, values: Sequence[float]) -> None:
    """Ticks where something was measured; the more is kept, the further left."""
    if along == "tokens":
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(values)
    axes.xaxis.set_major_formatter("{x:,.0f}" if along == "tokens" else PercentFormatter(1, decimals=0))
    if along == "keep":
        axes.invert_xaxis()


def save(figure: Figure, file: Path) -> None:
    """With one legend, of the first part."""
    figure.axes[0].legend(fontsize="small")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
