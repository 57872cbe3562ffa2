"""`liar report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from liar.cli.app import app, report_errors
from liar.errors import OptionError


@app.command()
def report(
    sources: Annotated[list[Path], typer.Argument(help="Folders that runs wrote, or files report.json.")],
    file: Annotated[Path | None, typer.Option("--plot", help="Write a figure to this file (.png, .pdf, .svg).")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page to this file; of several, a comparison.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the figure or page if it is there.")] = False,
) -> None:
    """Show what runs kept, how large the errors are, and what comes out of the model.

    For example:

        liar report slim

        liar report slim --html slim.html

        liar report slim slimmer slimmest --html comparison.html

        liar report slim/report.json --plot slim.png
    """
    from liar.cli.folder import page_sources, report_file  # noqa: PLC0415 (help needs no torch)
    from liar.io import check_file  # noqa: PLC0415 (help needs no torch)
    from liar.report import plot, write_page  # noqa: PLC0415 (help needs no torch)

    with report_errors():
        if file and len(sources) > 1:
            raise OptionError(f"--plot draws one report, got {len(sources)}; use --html to compare them")
        pages = page_sources(sources)
        for path in (file, html):
            if path:
                check_file(path, overwrite=force)
        if file:
            plot(report_file(sources[0]), file)
        if html:
            write_page(pages, html)
        for page in pages:
            typer.echo(f"{page.name}:" if len(pages) > 1 else "", nl=len(pages) > 1)
            typer.echo(str(page.report))
        if html:
            typer.echo(f"written to {html}")
