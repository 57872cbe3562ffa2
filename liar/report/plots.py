"""Figures from a `Report`, a `Mask` or the JSON of one, and from nothing else; matplotlib is an extra."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from liar.errors import CheckpointError, OptionError, wrap_parse_errors
from liar.files import replacing_file, user_path
from liar.mask import Mask
from liar.report.figures import figure_class, mask_figure, report_figure
from liar.report.report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "pdf", "svg")


def plot(source: Report | Mask | str | Path, file: str | Path | None = None) -> Figure:
    """Draw a report: what was kept and the held-out errors, layer by layer. Or draw a mask: every unit of every layer.

    Args:
        source: a `Report`, a `Mask`, or the path of the JSON of one.
        file: written too, if given; the ending says the format (`.png`, `.pdf`, `.svg`).

    Returns:
        A matplotlib figure that belongs to the caller. Of a report: sites without a held-out error (nothing was removed, or
        too few sequences to hold any out) have a bar but no marker. Of a mask: a panel [layers, units] for each kind; in wide
        layers a cell is several neighbouring units, and its shade the share of them that is kept.

    Raises:
        ImportError: matplotlib is not installed.
        OptionError: a file whose ending is no format.
        CheckpointError: there is no file of a report or a mask.
        MaskError: a mask without sites, or with names that are not `kind.layer`.

    Example:
        >>> report = liar.prune(model, calib, keep=0.5, progress=False)
        >>> figure = liar.plot(report, "report.png")
        >>> figure = liar.plot(mask, "mask.png")
    """
    kind = figure_class()
    if file is not None and Path(file).suffix[1:] not in FORMATS:
        raise OptionError(f"file={str(file)!r}: expected a name that ends in .{', .'.join(FORMATS)}")
    content = source if isinstance(source, (Report, Mask)) else _read(source)
    figure: Figure = mask_figure(content, kind) if isinstance(content, Mask) else report_figure(content, kind)
    if file is not None:
        with replacing_file(file) as fresh:
            figure.savefig(fresh, dpi=150)
    return figure


def _read(path: str | Path) -> Report | Mask:
    """A file that `Report.save` or `Mask.save` wrote."""
    with wrap_parse_errors(CheckpointError, "the JSON of a report or a mask", path):
        text = user_path(path).read_text(encoding="utf-8")
        return Mask.from_json(text) if "mask" in json.loads(text) else Report.from_json(text)
