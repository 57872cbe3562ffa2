"""Drawing reports and masks: figures of matplotlib, from data and from nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from liar.errors import MaskError
from liar.mask import Mask, abridged
from liar.report.content import ReportContent, SiteReport, kind_of, layer_of
from liar.report.findings import ROUNDING
from liar.report.quality import METRICS, Measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Two colours that colour-blind people tell apart (Okabe and Ito).
COLOURS = {"heads": "#0072B2", "neurons": "#E69F00"}
MARKERS = {"heads": "o", "neurons": "s"}
# Cells in a row of a mask's figure: more are too narrow to be told apart.
CELLS = 512


def report_figure(report: ReportContent, figure_class: Any) -> Figure:
    """Bars of what was kept above, errors below."""
    kinds = list(dict.fromkeys(kind_of(site.site) for site in report.sites))
    layers = sorted({layer_of(site.site) for site in report.sites})
    figure: Figure = figure_class(figsize=(min(16.0, max(6.4, 2.4 + 0.38 * len(layers))), 6.0), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for number, kind in enumerate(kinds):
        sites = [site for site in report.sites if kind_of(site.site) == kind]
        offset = (number - (len(kinds) - 1) / 2) * 0.8 / len(kinds)
        at = [layer_of(site.site) + offset for site in sites]
        style = {"color": COLOURS.get(kind, "0.4")}
        upper.bar(at, [site.kept / max(site.total, 1) for site in sites], 0.76 / len(kinds), label=kind, **style)
        _errors(lower, kind, at, sites, style)
    _finish(upper, lower, report, layers)
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


def _finish(upper: Axes, lower: Axes, report: ReportContent, layers: Sequence[int]) -> None:
    """Axes, titles and legends."""
    upper.set_title(
        f"{report.achieved:.1%} of the block parameters kept, {report.tokens:,} calibration tokens", loc="left", fontsize=11
    )
    upper.set_ylabel("share kept")
    upper.set_ylim(0, 1.03)
    upper.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    lower.set_ylabel("held-out error\n(residual over target energy)")
    lower.set_xlabel("layer")
    if any(site.before > 0 and site.after > 0 for site in report.sites):
        lower.set_yscale("log", subs=[])
        low, high = lower.get_ylim()
        # Less is rounding.
        lower.set_ylim(bottom=max(low, ROUNDING))
        if high < 1e4 * low:  # else there are too many to be written
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


def mask_figure(mask: Mask, figure_class: Any) -> Figure:
    """A panel for each kind, a row for each layer, kept units dark."""
    wrong = [name for name in mask.masks if not re.fullmatch(r".+\.\d+", name)]
    if wrong or not mask.masks:
        raise MaskError(
            f'expected a mask of sites such as "heads.0", got {abridged(wrong) or "no site"}; see Mask.of(mask, layout)'
        )
    kinds = list(dict.fromkeys(kind_of(name) for name in mask.masks))
    layers = sorted({layer_of(name) for name in mask.masks})
    height = min(16.0, max(2.6, 1.4 + 0.22 * len(layers)))
    figure: Figure = figure_class(figsize=(11.0, height), layout="constrained")
    most = {kind: max(len(units) for name, units in mask.masks.items() if kind_of(name) == kind) for kind in kinds}
    # Few heads beside many neurons: widths by the number of units, but never so narrow that titles run into each other.
    ratios = [min(max(units / max(most.values()), 0.4), 1.0) for units in most.values()]
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False, width_ratios=ratios)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        _rows(axes, kind, mask, layers, most[kind])
    panels[0].set_ylabel("layer")
    panels[-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return figure


def _rows(axes: Axes, kind: str, mask: Mask, layers: Sequence[int], most: int) -> None:
    """The kept units of one kind as an image [layers, units]; blank where a layer has fewer units than others."""
    kept = np.full((len(layers), most), np.nan)
    for row, layer in enumerate(layers):
        units = mask.masks.get(f"{kind}.{layer}", torch.empty(0)).double().numpy()
        kept[row, : len(units)] = units
    # Averaged here and not by the image: matplotlib would mix a layer with those above and below it.
    step = -(-most // CELLS)
    edges = np.arange(0, most, step)
    shares = np.add.reduceat(kept, edges, axis=1) / np.diff(edges, append=most)
    extent = (-0.5, len(edges) * step - 0.5, len(layers) - 0.5, -0.5)
    # A little more than 0 to 1: removed is a light grey, not the white of the paper.
    shown: dict[str, Any] = {"cmap": "Greys", "vmin": -0.15, "vmax": 1.1, "aspect": "auto", "interpolation": "nearest"}
    image = axes.imshow(shares, extent=extent, **shown)
    axes.hlines(np.arange(1, len(layers)) - 0.5, -0.5, most - 0.5, color="white", linewidth=1.0)
    for label, colour in zip(("kept", "removed"), image.to_rgba(np.array([1.0, 0.0])), strict=True):
        axes.plot([], [], "s", markersize=9, color=colour, label=label)
    axes.set_title(f"{kind}: {np.nanmean(kept):.1%} of {np.isfinite(kept).sum():,} units kept", loc="left", fontsize=11)
    axes.set_xlabel("unit" if step == 1 else f"unit (shade: share kept of {step} neighbours)")
    axes.set_xlim(-0.5, most - 0.5)
    axes.locator_params(axis="x", integer=True)
    every = max(1, -(-len(layers) // 32))
    axes.set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
    axes.spines[:].set_visible(False)


def figure_class() -> Any:
    """The class of matplotlib's figures, of which no global state is used.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise ImportError('plots need matplotlib, which is not installed: pip install "liar-prune[plot]"') from error
    return Figure


def comparison_figure(points: Mapping[str, tuple[int, Measure]], label: str, kind: Any) -> Figure:
    """A measure of the output against the size, of several models: a full marker repaired, an open one with the mask alone.

    Args:
        points: name -> (parameters, measure).
        label: of the measure.
        kind: the class of figures.
    """
    figure: Figure = kind(figsize=(8.0, 4.5), layout="constrained")
    axes = figure.subplots()
    style: dict[str, Any] = {"color": COLOURS["heads"]}
    sizes = [size for size, _ in points.values()]
    repaired, mask_only = ([getattr(measure, name) for _, measure in points.values()] for name in ("repaired", "mask_only"))
    axes.vlines(sizes, repaired, mask_only, linewidth=1.2, alpha=0.6, **style)
    axes.plot(sizes, mask_only, "o", label="mask alone", markerfacecolor="white", markersize=7, **style)
    axes.plot(sizes, repaired, "o", label="repaired", markersize=7, **style)
    for number, (name, (size, measure)) in enumerate(sorted(points.items(), key=lambda item: item[1][0])):
        # At different heights, since names of neighbours would run into each other.
        place = (6, 6 + 12 * (number % 3))
        axes.annotate(name, (size, measure.repaired), xytext=place, textcoords="offset points", fontsize=9, parse_math=False)
    axes.set_xlabel("parameters of the model")
    axes.set_ylabel(label, parse_math=False)
    if METRICS[next(iter(points.values()))[1].metric].perfect == 0 and min(repaired + mask_only) > ROUNDING:
        axes.set_yscale("log")
    axes.margins(x=0.15)
    axes.xaxis.set_major_formatter(lambda size, _: f"{size:,.0f}")
    axes.locator_params(axis="x", nbins=6)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return figure
