"""`liar reconstruct`."""

from __future__ import annotations

import json
from typing import Any

from liar.cli.app import app, report_errors
from liar.cli.parameters import Force, MaskFile, Model, Out, Resume, with_options
from liar.errors import MaskError, wrap_parse_errors
from liar.options import (
    CalibrationOptions,
    LoadOptions,
    ReconstructOptions,
    RunOptions,
    SaveOptions,
    SourceOptions,
    TeacherOptions,
)


@app.command()
@with_options(ReconstructOptions, TeacherOptions, SourceOptions, CalibrationOptions, LoadOptions, RunOptions, SaveOptions)
def reconstruct(
    model: Model,
    out: Out,
    mask: MaskFile | None = None,
    force: Force = False,
    resume: Resume = False,
    **options: Any,
) -> None:
    """Remove what a mask removes, and repair the model by least squares; or repair a model that is smaller already.

    For example:

        liar reconstruct bert-base-uncased slim --mask mask.json --calib texts.txt

        liar reconstruct ./llama slim --mask mask.json --calib texts.jsonl.gz --column body --target layer_output

        liar reconstruct ./cut-elsewhere repaired --teacher bert-base-uncased --calib texts.txt
    """
    from liar.cli.run import finish, run_from  # noqa: PLC0415 (help needs no torch)

    with report_errors():
        content = None
        if mask is not None:
            with wrap_parse_errors(MaskError, "a JSON file with a mask, as Mask.save writes it", mask):
                content = json.loads(mask.read_text(encoding="utf-8"))
        finish(run_from("reconstruct", model, out, options, mask=content, resume=resume), overwrite=force)
