"""`liar families`."""

from __future__ import annotations

from pprint import pformat
from typing import Annotated

import typer

from liar.cli.app import app, report_errors


@app.command()
def families(
    propose: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Print a table for the model in this folder, found by tracing it.")
    ] = None,
) -> None:
    """List the families of models that can be pruned, or find the table of another one.

    For example:

        liar families

        liar families --propose my-model
    """
    from liar.models import families as registered  # noqa: PLC0415 (help needs no torch)

    if propose is None:
        known = sorted(registered(), key=lambda family: family.model_type)
        width = max(len(family.model_type) for family in known)
        for family in known:
            typer.echo(f"{family.model_type:{width}} {family.note}")
        return
    from liar.io import load  # noqa: PLC0415 (help needs no torch)
    from liar.testing import tiny_batches  # noqa: PLC0415 (help needs no torch)
    from liar.tracing import propose_family  # noqa: PLC0415 (help needs no torch)

    with report_errors():
        model = load(propose)
        found = propose_family(model, tiny_batches(model, batches=1)[0])
    typer.echo("from liar import Family, FusedProducer, SitePattern\n")
    typer.echo(f"FAMILIES = (\n{pformat(found, width=120)},\n)")
