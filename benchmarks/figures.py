"""Figures: a line with standard errors per rule; and files that know what is drawn in them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter
from PIL import Image

from benchmarks.summary import LABELS, MORE

AXES = {"keep": "share of block parameters kept", "tokens": "calibration tokens"}
# The lines of the defaults are in front.
OURS = ("ours", "reconstruction")
FRONT = {"color": "black", "linewidth": 2.5, "markersize": 7, "zorder": 5}
OTHERS = {"linewidth": 1.2, "markersize": 4, "alpha": 0.8}
# Perplexities of so many times the dense model's are beyond use, and out of view.
HIGHEST = 20
# Where a PNG file has its fingerprint.
FINGERPRINT = "Comment"


def draw(runs: Sequence[Mapping[str, Any]], dense: Mapping[str, float], metric: str) -> Figure:
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
    return with_legends(figure)


def published(parts: Mapping[str, pandas.DataFrame], along: str, rules: Sequence[str]) -> Figure:
    """A number against the kept share or the tokens: {title: rows of `summary.runs`, of one number}; none where none are."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    parts = {title: part[part["rule"].isin(rules)] for title, part in parts.items() if part["rule"].isin(rules).any()}
    for axes, (title, part) in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts.items(), strict=True):
        (number,) = part["number"].unique()
        lines(axes, part, along, "value", [rule for rule in rules if rule in set(part["rule"])])
        for dense in part["dense"].dropna().unique()[:1]:
            axes.axhline(dense, color="black", linestyle=":", label="dense")
        axes.set(title=title, xlabel=AXES[along], ylabel=f"{number} ({'more' if MORE[number] else 'less'} is better)")
        if number == "perplexity":
            axes.set_yscale("log")
            axes.set_ylim(top=min(axes.get_ylim()[1], HIGHEST * part["dense"].min()))
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter("{x:g}")
        ticks(axes, along, sorted(part[along].unique()))
        axes.grid(alpha=0.3)
    return with_legends(figure)


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


def with_legends(figure: Figure) -> Figure:
    """The figure with a legend, and another where other lines are drawn."""
    shown: list[str] = []
    for axes in figure.axes:
        labels = axes.get_legend_handles_labels()[1]
        if not set(labels) <= set(shown):
            axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
            shown = labels
    return figure


def fingerprint(figure: Figure) -> str:
    """A checksum of what is drawn: titles, and the points of every line to six digits, whatever draws them."""
    drawn = [
        (axes.get_title(), line.get_label(), *(f"{number:.6g}" for number in numpy.ravel(line.get_xydata())))
        for axes in figure.axes
        for line in axes.get_lines()
    ]
    return f"{zlib.crc32(repr(drawn).encode()):08x}"


def save(figure: Figure, file: Path) -> None:
    """Write a figure, and its fingerprint into the file if that is PNG."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, metadata={FINGERPRINT: fingerprint(figure)} if file.suffix == ".png" else None)


def fingerprint_of(file: Path) -> str | None:
    """The fingerprint that `save` wrote; None if there is no such file."""
    if not file.exists():
        return None
    with Image.open(file) as image:
        return image.info.get(FINGERPRINT)
