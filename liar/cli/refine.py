"""`liar refine`."""

from __future__ import annotations

from typing import Any

from liar.cli.app import app, report_errors
from liar.cli.parameters import Force, Model, Out, with_options
from liar.options import CalibrationOptions, LoadOptions, RefineOptions, SaveOptions, SourceOptions, TeacherOptions


@app.command()
@with_options(TeacherOptions, RefineOptions, SourceOptions, CalibrationOptions, LoadOptions, SaveOptions)
def refine(model: Model, out: Out, force: Force = False, **options: Any) -> None:
    """Train the kept weights of a pruned model until its layers give what those of the dense model give.

    For example:

        liar refine slim refined --teacher bert-base-uncased --calib texts.txt

        liar refine slim refined --teacher ./llama --granularity 2 --epochs 3 --calib texts.txt --pack
    """
    from liar.cli.run import finish, run_from  # noqa: PLC0415 (help needs no torch)

    with report_errors():
        finish(run_from("refine", model, out, options), overwrite=force)
