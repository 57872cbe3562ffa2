"""`liar prune`."""

from __future__ import annotations

from typing import Any

from liar.cli.app import app, report_errors
from liar.cli.parameters import Force, Model, Out, Resume, with_options
from liar.options import (
    CalibrationOptions,
    LoadOptions,
    PruneOptions,
    ReconstructOptions,
    RunOptions,
    SaveOptions,
    SelectOptions,
    SourceOptions,
)


@app.command()
@with_options(
    SelectOptions, PruneOptions, ReconstructOptions, SourceOptions, CalibrationOptions, LoadOptions, RunOptions, SaveOptions
)
def prune(model: Model, out: Out, force: Force = False, resume: Resume = False, **options: Any) -> None:
    """Choose what stays, remove the rest, and repair the model by least squares.

    For example:

        liar prune bert-base-uncased slim --keep 0.5 --calib texts.txt

        liar prune ./llama slim --keep 0.7 --calib wikitext --config wikitext-2-raw-v1 --pack --tokens 100000

        liar prune bert-base-uncased slim --keep 0.5 --budget latency.json --calib texts.txt

        liar prune ./llama slim --keep 0.7 --calib texts.txt --activations disk --resume

        torchrun --nproc-per-node 8 -m liar prune ./llama slim --keep 0.7 --calib texts.txt --device cuda
    """
    from liar.cli.run import finish, run_from  # noqa: PLC0415 (help needs no torch)

    with report_errors():
        finish(run_from("prune", model, out, options, resume=resume), overwrite=force)
