"""`liar select`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from liar.cli.app import app, report_errors
from liar.cli.parameters import Force, Model, with_options
from liar.cli.processes import process_group
from liar.errors import OptionError
from liar.options import BUDGETS, CalibrationOptions, LoadOptions, RunOptions, SelectOptions, SourceOptions


@app.command()
@with_options(SelectOptions, SourceOptions, CalibrationOptions, LoadOptions, RunOptions, optional=["calib"])
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
    from liar.api import select_with  # noqa: PLC0415 (help needs no torch)
    from liar.cli.run import check_source, group_options, load_model  # noqa: PLC0415 (help needs no torch)
    from liar.cli.source import SourceTexts  # noqa: PLC0415 (help needs no torch)
    from liar.io import check_file, load_tokenizer  # noqa: PLC0415 (help needs no torch)
    from liar.models import layout_of  # noqa: PLC0415 (help needs no torch)
    from liar.runtime import distributed, remove_journal  # noqa: PLC0415 (help needs no torch)
    from liar.selection import CRITERIA, Costs  # noqa: PLC0415 (help needs no torch)

    with report_errors():
        check_file(out, overwrite=force)
        if options["budget"] not in BUDGETS:
            options["budget"] = Costs.load(options["budget"])
        selection, load = group_options(SelectOptions, options), group_options(LoadOptions, options)
        needs_data = CRITERIA[selection.criterion].needs is not None
        if needs_data and options["calib"] is None:
            raise OptionError(f"criterion={selection.criterion!r} needs activations: give texts with --calib")
        source = group_options(SourceOptions, options) if needs_data else None
        check_source(source, load)
        with process_group(load.device):
            batches = None
            if source is not None:
                batches = SourceTexts(source, load_tokenizer(model), group_options(CalibrationOptions, options)).batches()
            loaded = load_model(model, load)
            mask = select_with(loaded, batches, selection, group_options(RunOptions, options))
            distributed.answer(partial(mask.save, out))
            if (folder := options["run_folder"]) is not None:  # as prune does it: the work is done
                distributed.answer(partial(remove_journal, folder, "select"))
        layout = layout_of(loaded).matching(mask.masks)
        for site in layout.sites:
            typer.echo(f"{site.name:12} {mask.kept(site.name):6} of {site.units}")
        typer.echo(f"{mask.parameters(layout) / layout.parameters:.1%} of the block parameters kept; written to {out}")
