"""`liar latency`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from liar.cli.app import app, report_errors
from liar.cli.parameters import Force, Model, with_options
from liar.options import LENGTH, LoadOptions


@app.command()
@with_options(LoadOptions)
def latency(
    model: Model,
    out: Annotated[Path, typer.Argument(help="JSON file to write, for --budget.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per batch that is timed.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens per sequence that is timed.")] = LENGTH,
    force: Force = False,
    **options: Any,
) -> None:
    """Time the layers of a model at several widths on this machine, as a budget for prune and select.

    For example:

        liar latency bert-base-uncased latency.json --batch-size 8 --length 128
    """
    from liar.cli.run import check_source, load_model  # noqa: PLC0415 (help needs no torch)
    from liar.io import check_file  # noqa: PLC0415 (help needs no torch)
    from liar.selection import latency as measure  # noqa: PLC0415 (help needs no torch)

    with report_errors():
        check_file(out, overwrite=force)
        load = LoadOptions(**options)
        check_source(None, load)
        costs = measure(load_model(model, load), batch_size=batch_size, length=length)
        costs.save(out)
        typer.echo(f"{costs.dense * 1000:.1f} ms per batch; written to {out}")
