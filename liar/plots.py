"""Figures from a `Report` or its JSON, and from nothing else; matplotlib is an extra."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liar.report import Report, SiteReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Two colours that colour-blind people tell apart (Okabe and Ito).
COLOURS = {"heads": "#0072B2", "neurons": "#E69F00"}
MARKERS = {"heads": "o", "neurons": "s"}


def plot(report: Report | str | Path, file: str | Path | None = None) -> Figure:
    """Draw, layer by layer, what was kept and the held-out error before and after reconstruction.

    Args:
        report: a `Report`, or the path of its JSON.
        file: written too, if given; the ending says the format (`.png`, `.pdf`, `.svg`).

    Returns:
        A matplotlib figure that belongs to the caller. Sites without a held-out error (nothing was removed, or too few
        sequences to hold any out) have a bar but no marker.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> figure = liar.plot("slim/report.json", "slim.png")  # doctest: +SKIP
    """
    figure_class = _figure_class()
    found = report if isinstance(report, Report) else Report.load(report)
    kinds = list(dict.fromkeys(_kind(site) for site in found.sites))
    layers = sorted({_layer(site) for site in found.sites})
    figure: Figure = figure_class(figsize=(min(16.0, max(6.4, 2.4 + 0.38 * len(layers))), 6.0), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for number, kind in enumerate(kinds):
        sites = [site for site in found.sites if _kind(site) == kind]
        offset = (number - (len(kinds) - 1) / 2) * 0.8 / len(kinds)
        at = [_layer(site) + offset for site in sites]
        style = {"color": COLOURS.get(kind, "0.4")}
        upper.bar(at, [site.kept / site.total for site in sites], 0.76 / len(kinds), label=kind, **style)
        _errors(lower, kind, at, sites, style)
    _finish(upper, lower, found, layers)
    if file is not None:
        figure.savefig(file, dpi=150)
    return figure


def _errors(axes: Axes, kind: str, at: Sequence[float], sites: Sequence[SiteReport], style: dict[str, Any]) -> None:
    """An open marker before, a full one after, and a line between them, at every site that has errors to show."""
    shown = [(x, site) for x, site in zip(at, sites, strict=True) if site.before > 0 and site.after > 0]
    where = [x for x, _ in shown]
    before, after = [site.before for _, site in shown], [site.after for _, site in shown]
    marker = MARKERS.get(kind, "D")
    axes.vlines(where, after, before, linewidth=1.2, alpha=0.6, **style)
    axes.plot(where, before, marker, label=f"{kind}, before", markerfacecolor="white", markersize=6, **style)
    axes.plot(where, after, marker, label=f"{kind}, after", markersize=6, **style)


def _finish(upper: Axes, lower: Axes, report: Report, layers: Sequence[int]) -> None:
    """Axes, titles and legends."""
    upper.set_title(
        f"{report.got:.1%} of the block parameters kept, {report.tokens:,} calibration tokens", loc="left", fontsize=11
    )
    upper.set_ylabel("share kept")
    upper.set_ylim(0, 1.03)
    upper.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    lower.set_ylabel("held-out error\n(residual over target energy)")
    lower.set_xlabel("layer")
    if any(site.before > 0 and site.after > 0 for site in report.sites):
        lower.set_yscale("log", subs=[2, 5])
        for axis_formatter in (lower.yaxis.set_major_formatter, lower.yaxis.set_minor_formatter):
            axis_formatter(lambda error, _: f"{error:g}")
    else:
        lower.text(0.5, 0.5, "no held-out errors in this report", transform=lower.transAxes, ha="center", color="0.4")
    step = max(1, -(-len(layers) // 32))
    lower.set_xticks(layers[::step])
    lower.set_xlim(layers[0] - 0.6, layers[-1] + 0.6)
    for axes in (upper, lower):
        axes.grid(axis="y", which="both", color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _kind(site: SiteReport) -> str:
    return site.site.rpartition(".")[0]


def _layer(site: SiteReport) -> int:
    return int(site.site.rpartition(".")[2])


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise ImportError('plots need matplotlib, which is not installed: pip install "liar-prune[plot]"') from error
    return Figure
