"""`liar families`."""

from __future__ import annotations

import typer

from liar.cli.app import app


@app.command()
def families() -> None:
    """List the families of models that can be pruned.

    For example:

        liar families
    """
    from liar.models import families as registered  # noqa: PLC0415 (help needs no torch)

    for family in registered():
        typer.echo(f"{family.model_type:12} {family.note}")
