"""`liar calibrate`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from liar.cli.app import app, report_errors
from liar.cli.parameters import Model, with_options
from liar.options import GenerateOptions, LoadOptions


@app.command()
@with_options(GenerateOptions, LoadOptions)
def calibrate(
    model: Model,
    out: Annotated[Path, typer.Option(help="JSON lines to write, for --calib. If the file is there, the run goes on with it.")],
    **options: Any,
) -> None:
    """Let a language model write calibration texts itself. A run that was stopped goes on when it is called again.

    For example:

        liar calibrate ./llama --tokens 100000 --out own.jsonl

        liar calibrate ./llama --tokens 100000 --max-length 1024 --language en --out own.jsonl

        liar reconstruct ./llama slim --mask mask.json --calib own.jsonl
    """
    from liar.cli.run import check_source, group_options, load_model  # noqa: PLC0415 (help needs no torch)
    from liar.generation import self_generate  # noqa: PLC0415 (help needs no torch)
    from liar.io import check_file, load_tokenizer  # noqa: PLC0415 (help needs no torch)

    with report_errors():
        check_file(out, overwrite=True)
        load, how = (group_options(group, options) for group in (LoadOptions, GenerateOptions))
        check_source(None, load)
        tokenizer, loaded = load_tokenizer(model), load_model(model, load)
        written = self_generate(loaded, tokenizer, **asdict(how), file=out)
        tried = len(written.records) + written.rejected
        typer.echo(f"{len(written.records):,} texts with {written.tokens:,} tokens; {written.rejected:,} of {tried:,} rejected")
        typer.echo(f"written to {out}")
