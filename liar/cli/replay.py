"""`liar replay`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from liar.cli.app import app, report_errors
from liar.cli.parameters import Force
from liar.errors import OptionError, wrap_parse_errors


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A run.json that an earlier run wrote.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write; that of the earlier run if not given.")] = None,
    force: Force = False,
) -> None:
    """Repeat an earlier run, from its run.json.

    For example:

        liar replay slim/run.json --out again
    """
    from liar.cli.run import Run, finish  # noqa: PLC0415 (help needs no torch)

    with report_errors():
        with wrap_parse_errors(OptionError, "a run.json that an earlier run wrote", run):
            earlier = Run.from_json(run.read_text(encoding="utf-8"))
        finish(replace(earlier, out=str(out)) if out else earlier, overwrite=force)
