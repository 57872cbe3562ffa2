"""`liar plan`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from liar.cli.app import app, report_errors
from liar.cli.parameters import Model, with_options
from liar.options import LoadOptions, PlanOptions, ReconstructOptions, SelectOptions


@app.command()
@with_options(SelectOptions, ReconstructOptions, PlanOptions, LoadOptions)
def plan(
    model: Model,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of tables.")] = False,
    **options: Any,
) -> None:
    """Say how much memory, how many operations and how much time liar prune will need; only the configuration is read.

    For example:

        liar plan meta-llama/Llama-2-7b-hf --keep 0.5 --tokens 262144 --max-length 2048 --batch-size 1

        liar plan my-model --keep 0.5 --tokens 65536 --activations disk --json
    """
    from liar.cli.run import group_options  # noqa: PLC0415 (help needs no torch)
    from liar.planning import plan_with  # noqa: PLC0415 (help needs no torch)

    with report_errors():
        planned = plan_with(
            model,
            options["tokens"],
            group_options(SelectOptions, options),
            group_options(ReconstructOptions, options),
            group_options(PlanOptions, options),
            group_options(LoadOptions, options),
        )
        typer.echo(planned.to_json() if as_json else str(planned))
