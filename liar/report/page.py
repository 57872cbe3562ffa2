"""Reports as one web page that needs no network: what was cut where, how much is lost, whether to trust it, how to load it.

The page is plain HTML and CSS from a template of Jinja (which torch brings along), without a script. What was kept is a table,
so that screen readers and searches find every number; its bars are small inline drawings. The charts are those of
`liar.plot`, SVG by matplotlib: a chart library of JavaScript would weigh more than the rest of the page, and draw nothing on
paper or where scripts are off. Colours are variables of the style sheet, which has them for light, dark and paper.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from liar.errors import OptionError
from liar.files import user_path, write_text
from liar.mask import Mask
from liar.report.content import CostChange, ReportContent, kind_of, layer_of
from liar.report.figures import COLOURS, comparison_figure, figure_class, report_figure
from liar.report.findings import ROUNDING, findings, words_of
from liar.report.quality import METRICS, Measure
from liar.templates import render
from liar.verdicts import OutputVerdict, Verdict
from liar.versions import versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# Colours of the figures -> those of the page's style sheet.
THEME = {
    "#000000": "currentColor",
    "#ffffff": "var(--surface)",
    "#e6e6e6": "var(--line)",
    "#666666": "var(--muted)",
    **{colour.lower(): f"var(--{kind})" for kind, colour in COLOURS.items()},
}
# Of matplotlib's ids, only those that something refers to are needed; the others would come again in the next chart.
UNUSED_ID = re.compile(
    r' id="(?:figure|axes|patch|text|line2d|legend|LineCollection|matplotlib\.axis|xtick|ytick|Path\w*)_\d+"'
)
# Numbers of options that a reader knows by other names.
LEVELS = {"good": "✓", "plain": "–", "warning": "!"}


@dataclass(frozen=True)
class PageSource:
    """One report of a page, with what its folder says beside it.

    Attributes:
        name: of the folder, or whatever the report is called.
        report: the report.
        mask: which units stay, if known: heads are then drawn one by one.
        loading: lines of Python that load the model.
        replaying: a command that repeats the run, if it was one of the command line's.
        run: what else is known of the run: name -> value.
    """

    name: str
    report: ReportContent
    mask: Mask | None = None
    loading: str = 'import liar\n\nmodel = liar.load("FOLDER")  # where liar.save wrote it'
    replaying: str | None = None
    run: Mapping[str, str] = field(default_factory=dict)


def write_page(sources: Sequence[PageSource], path: str | Path) -> None:
    """Write the page of some reports, whole or not at all.

    Raises:
        OptionError: a name that does not end in .html.
        ImportError: matplotlib is not installed.
        CheckpointError: the file cannot be written.
    """
    if user_path(path).suffix not in (".html", ".htm"):
        raise OptionError(f"path={str(path)!r}: expected a name that ends in .html")
    write_text(path, page(sources))


def page(sources: Sequence[PageSource]) -> str:
    """The HTML of a page about some reports; of several, it begins with a comparison."""
    parts = [_view(source, f"r{number}") for number, source in enumerate(sources)]
    title = f"{sources[0].name}: what was pruned" if len(sources) == 1 else f"{len(sources)} pruned models compared"
    comparison = _comparison(sources) if len(sources) > 1 else None
    return render("page.html.j2", title=title, parts=parts, comparison=comparison, versions=versions(), levels=LEVELS)


def notebook_cell(report: ReportContent) -> str:
    """The HTML that a notebook shows of a report: headline, warnings, output, and a table of the sites."""
    return render("report_cell.html.j2", **_parts(report), levels=LEVELS)


def _view(source: PageSource, key: str) -> dict[str, Any]:
    """Everything that the template says of one report; `key` is unique on the page."""
    report = source.report
    chart = _svg(
        report_figure(report, figure_class()), key, "Share kept and held-out error by layer; the tables have the numbers"
    )
    kinds, layers = _layers(report, source.mask)
    return {
        "key": key,
        "source": source,
        "chart": chart,
        "kinds": kinds,
        "layers": layers,
        "calibration": _calibration(report, source.run),
        "options": {name: str(value) for name, value in report.options.items()},
        "seconds": sorted(report.seconds.items(), key=lambda item: -item[1]),
        **_parts(report),
    }


def _parts(report: ReportContent) -> dict[str, Any]:
    """What page and notebook have in common."""
    return {
        "headline": _headline(report),
        "findings": findings(report),
        "quality": _quality(report),
        "sites": [_site_row(site) for site in report.sites],
        "verdicts": [verdict for verdict in Verdict if any(site.verdict is verdict for site in report.sites)],
    }


def _headline(report: ReportContent) -> list[tuple[str, str, str]]:
    """(what, number, explanation) of the most important numbers."""
    before, after = report.parameters
    width = BYTES.get(report.dtype)
    size = f", {_bytes(before * width)} to {_bytes(after * width)} as {report.dtype}" if width else ""
    requested = "" if report.requested is None else f"{report.requested:.1%} were asked for"
    rows = [
        ("Parameters", f"{after:,}", f"{_change(before, after)} of {before:,}{size}"),
        ("Kept of the blocks", f"{report.achieved:.1%}", requested or "by a mask that was given"),
    ]
    if report.cost is not None and report.cost.name != "parameters":
        rows.append(_cost(report.cost))
    if report.quality is not None and report.quality.measures:
        rows += [_output(measure, held_out=report.quality.held_out) for measure in report.quality.measures[:2]]
    errors = [(site.before, site.after) for site in report.sites if math.isfinite(site.before) and math.isfinite(site.after)]
    if errors:
        first, last = (median(column) for column in zip(*errors, strict=True))
        rows.append(("Error of a layer", f"{last:.3g}", f"median, on held-out tokens; {first:.3g} before the repair"))
    return rows


def _change(before: float, after: float) -> str:
    """By how much a number has changed; a dash where it was nothing."""
    return _percent(after / before - 1) if before else "–"


def _cost(cost: CostChange) -> tuple[str, str, str]:
    if cost.name == "seconds":
        about = f"of {cost.before * 1e3:,.4g} ms, summed from times measured layer by layer: measure the model itself, too"
        return "Time of a pass", f"{cost.after * 1e3:,.4g} ms", f"{_change(cost.before, cost.after)} {about}"
    return cost.name, f"{cost.after:,.4g}", f"{_change(cost.before, cost.after)} of {cost.before:,.4g}"


def _output(measure: Measure, *, held_out: bool) -> tuple[str, str, str]:
    metric = METRICS[measure.metric]
    where = "held-out text" if held_out else "text that the fit has seen"
    label = f"{metric.label[0].upper()}{metric.label[1:]} of {measure.output}"
    return (
        label,
        metric.show(measure.repaired),
        f"{metric.show(measure.mask_only)} with the mask alone; on {where}",
    )


def _quality(report: ReportContent) -> dict[str, Any] | None:
    quality = report.quality
    if quality is None:
        return None
    rows = []
    for measure in quality.measures:
        metric = METRICS[measure.metric]
        words = "nothing was lost" if measure.is_unchanged else "better" if measure.is_better else "not better"
        rows.append(
            {
                "label": f"{metric.label} of {measure.output}",
                "text": metric.text,
                "repaired": metric.show(measure.repaired),
                "mask_only": metric.show(measure.mask_only),
                "words": words,
                "level": {"better": "good", "not better": "warning"}.get(words, "plain"),
            }
        )
    levels = {OutputVerdict.BETTER: "good", OutputVerdict.NOT_BETTER: "warning"}
    return {"rows": rows, "quality": quality, "level": levels.get(quality.verdict, "plain")}


def _site_row(site: Any) -> dict[str, Any]:
    words, level = words_of(site)
    change = site.after / site.before - 1 if site.before > ROUNDING else math.nan
    return {
        "site": site.site,
        "kept": site.kept,
        "total": site.total,
        "before": _number(site.before),
        "after": _number(site.after),
        "change": _percent(change) if math.isfinite(change) else "–",
        "words": words,
        "level": level,
        "ridge": "weights kept" if site.ridge == math.inf else _number(site.ridge),
        "condition": _number(site.condition),
        "seconds": f"{site.seconds:.2f}",
        "verdict": site.verdict.value,
    }


def _layers(report: ReportContent, mask: Mask | None) -> tuple[list[str], list[dict[str, Any]]]:
    """The kinds of sites, and by layer what was kept of each: None where a layer has no such site."""
    kinds = list(dict.fromkeys(kind_of(site.site) for site in report.sites))
    by_name = {site.site: site for site in report.sites}
    rows = []
    for layer in sorted({layer_of(site.site) for site in report.sites}):
        cells: list[dict[str, Any] | None] = []
        for kind in kinds:
            site = by_name.get(f"{kind}.{layer}")
            units = mask.masks.get(f"{kind}.{layer}") if mask is not None and kind == "heads" else None
            kept = [bool(each) for each in units] if units is not None and site and len(units) == site.total else None
            own = {"kind": kind, "kept": site.kept, "total": site.total, **_bar(site.kept, site.total, kept)} if site else None
            cells.append(own)
        rows.append({"layer": layer, "cells": cells})
    return kinds, rows


def _bar(kept: int, total: int, units: Sequence[bool] | None) -> dict[str, Any]:
    """A drawing of what was kept: a path in a box of so many units; units one by one where they are known."""
    if units is None:
        return {"width": total, "path": f"M0 0h{kept}v1H0z", "ticks": ""}
    path = "".join(f"M{place} 0h1v1h-1z" for place, is_kept in enumerate(units) if is_kept)
    return {"width": total, "path": path, "ticks": "".join(f"M{place} 0v1" for place in range(1, total))}


def _calibration(report: ReportContent, run: Mapping[str, str]) -> list[tuple[str, str]]:
    rows = [("Tokens", f"{report.tokens:,}")]
    if report.distinct_tokens is not None:
        share = report.distinct_tokens / report.tokens if report.tokens else 0
        rows.append(("Distinct", f"{report.distinct_tokens:,} tokens ({share:.1%}); copies count once"))
    rows.append(("Sequences", f"{report.sequences:,}"))
    if report.lengths is not None:
        shortest, middle, longest = report.lengths
        rows.append(("Lengths", f"{shortest:,} to {longest:,} tokens, median {middle:,}"))
    return [*rows, *run.items()]


def _comparison(sources: Sequence[PageSource]) -> dict[str, Any]:
    """A table of all reports and, where they have a measure of the output in common, a chart of it against the size."""
    reports = [source.report for source in sources]
    keys = [{(m.output, m.metric) for m in report.quality.measures} if report.quality else set() for report in reports]
    together = [key for key in dict.fromkeys(key for each in keys for key in sorted(each)) if sum(key in k for k in keys) > 1]
    columns = sorted(together, key=lambda key: not METRICS[key[1]].leads)
    rows = []
    for source in sources:
        quality = source.report.quality
        by_key = {(m.output, m.metric): m for m in quality.measures} if quality else {}
        cells = [
            [METRICS[key[1]].show(value) for value in (by_key[key].repaired, by_key[key].mask_only)] if key in by_key else None
            for key in columns
        ]
        rows.append(
            {"source": source, "headline": _headline(source.report), "cells": cells, "findings": findings(source.report)}
        )
    chart = None
    if columns:
        names = [source.name for source in sources]
        points = {
            f"{source.name} ({number})" if names.count(source.name) > 1 else source.name: (source.report.parameters[1], measure)
            for number, source in enumerate(sources, 1)
            if source.report.quality
            for measure in source.report.quality.measures
            if (measure.output, measure.metric) == columns[0]
        }
        name = f"{METRICS[columns[0][1]].label} of {columns[0][0]}"
        chart = _svg(
            comparison_figure(points, name, figure_class()), "cmp", f"{name} against parameters; the table has the numbers"
        )
    labels = [f"{METRICS[metric].label} of {output}" for output, metric in columns]
    return {"columns": labels, "rows": rows, "chart": chart}


def _svg(figure: Figure, key: str, label: str) -> str:
    """A figure as inline SVG: text as text, colours of the style sheet, ids that no other chart has."""
    from matplotlib import rc_context  # noqa: PLC0415 (an extra)

    out = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": key}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = UNUSED_ID.sub("", text)
    for colour, variable in THEME.items():
        text = text.replace(colour, variable)
    # Sizes in points would make it as wide as paper: the style sheet decides.
    return re.sub(r'<svg ([^>]*?)width="([\d.]+)pt" height="[\d.]+pt"', _opening(label), text, count=1)


def _opening(label: str) -> Callable[[re.Match[str]], str]:
    """Makes the beginning of an SVG element: with a name, and with limits in place of its size."""

    def opening(found: re.Match[str]) -> str:
        width = float(found[2])
        style = f"min-width: {0.9 * width:.0f}px; max-width: {1.5 * width:.0f}px"
        return f'<svg role="img" aria-label="{label}" style="{style}" {found[1]}'

    return opening


def _number(value: float) -> str:
    if math.isnan(value):
        return "–"
    return "0" if abs(value) <= ROUNDING else f"{value:.3g}"


def _percent(change: float) -> str:
    return f"{change:+.1%}".replace("-", "−")


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
