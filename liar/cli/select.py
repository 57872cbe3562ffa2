"""`liar select`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from liar.api import select_with
from liar.cli.app import app, report_errors
from liar.cli.parameters import Force, Model, with_options
from liar.cli.run import calibration_batches, check_source, load_model, load_tokenizer
from liar.io import check_file
from liar.models import discover
from liar.options import BUDGETS, CalibrationOptions, LoadOptions, SelectOptions, SourceOptions
from liar.selection import CRITERIA, Costs


@app.command()
@with_options(SelectOptions, SourceOptions, CalibrationOptions, LoadOptions, optional=["calib"])
def select(
    model: Model,
    out: Annotated[Path, typer.Argument(help="JSON file to write, for reconstruct --mask.")],
    force: Force = False,
    **options: Any,
) -> None:
    """Choose what stays, and write the mask. The model is not changed.

    For example:

        liar select bert-base-uncased mask.json --keep 0.5 --calib texts.txt

        liar select bert-base-uncased mask.json --keep 0.5 --criterion magnitude
    """

    def group(kind: Any) -> Any:
        return kind(**{each.name: options[each.name] for each in fields(kind)})

    with report_errors():
        check_file(out, overwrite=force)
        if options["budget"] not in BUDGETS:
            options["budget"] = Costs.load(options["budget"])
        selection, load = group(SelectOptions), group(LoadOptions)
        source = None if options["calib"] is None else group(SourceOptions)
        check_source(source, load)
        needs_data = CRITERIA[selection.criterion].needs is not None and source is not None
        batches = (
            calibration_batches(load_tokenizer(model), source, group(CalibrationOptions)) if source and needs_data else None
        )
        loaded = load_model(model, load)
        mask = select_with(loaded, batches, selection)
        mask.save(out)
        layout = discover(loaded)
        for site in layout.sites:
            typer.echo(f"{site.name:12} {mask.kept(site.name):6} of {site.units}")
        typer.echo(f"{mask.parameters(layout) / layout.parameters:.1%} of the block parameters kept; written to {out}")
