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

    known = sorted(registered(), key=lambda family: family.model_type)
    width = max(len(family.model_type) for family in known)
    for family in known:
        typer.echo(f"{family.model_type:{width}} {family.note}")
