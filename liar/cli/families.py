"""`liar families`."""

from __future__ import annotations

import typer

from liar.cli.app import app
from liar.models import families as registered


@app.command()
def families() -> None:
    """List the families of models that can be pruned.

    For example:

        liar families
    """
    for family in registered():
        typer.echo(f"{family.model_type:12} {family.note}")
