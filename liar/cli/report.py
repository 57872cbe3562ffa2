"""`liar report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from liar.cli.app import app, report_errors
from liar.files import user_path


@app.command()
def report(
    source: Annotated[Path, typer.Argument(help="Folder that a run wrote, or a report.json.")],
    file: Annotated[Path | None, typer.Option("--plot", help="Write a figure to this file (.png, .pdf, .svg).")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the figure if it is there.")] = False,
) -> None:
    """Show what a run kept and how large the errors are, before and after.

    For example:

        liar report slim

        liar report slim/report.json --plot slim.png
    """
    from liar.io import check_file  # noqa: PLC0415 (help needs no torch)
    from liar.report import Report, plot  # noqa: PLC0415 (help needs no torch)

    with report_errors():
        source = user_path(source)
        content = Report.load(source / "report.json" if source.is_dir() else source)
        if file:
            check_file(file, overwrite=force)
            plot(content, file)
        typer.echo(str(content))
