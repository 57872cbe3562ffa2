"""The arguments and options of the command line: possible values, ranges, help."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from liar.api import BUDGETS
from liar.criteria import CRITERIA, SCOPES, check_keep
from liar.errors import OptionError
from liar.rebuild import BIASES, TARGETS
from liar.run import DTYPES
from liar.solve import SOLVERS, check_ridge


def _one_of(values: Iterable[str], text: str) -> Any:
    """An option with a few possible values; typer says what they are, and so does the help."""
    possible = list(values)

    def check(value: str) -> str:
        if value not in possible:
            raise typer.BadParameter(f"expected one of {', '.join(possible)}, got {value!r}")
        return value

    return typer.Option(callback=check, help=f"{text}: {', '.join(possible)}.")


def _checked(check: Callable[[Any], None], value: Any) -> None:
    """What the library says of a value, as wrong usage."""
    try:
        check(value)
    except OptionError as error:
        raise typer.BadParameter(str(error)) from error


def _share(value: float) -> float:
    _checked(check_keep, value)
    return value


_BUDGETS = f"{', '.join(BUDGETS)}, or a file that liar latency wrote"


def _budget(value: str) -> str:
    if value in BUDGETS or Path(value).is_file():
        return value
    raise typer.BadParameter(f"expected {_BUDGETS}; got {value!r}")


def _ridge(value: str) -> str:
    if value != "auto":
        try:
            number = float(value)
        except ValueError as error:
            raise typer.BadParameter(f"expected auto or a number >= 0, got {value!r}") from error
        _checked(check_ridge, number)
    return value


Model = Annotated[str, typer.Argument(help="Model folder, or a name on the hub.")]
Out = Annotated[Path, typer.Argument(help="Folder to write: model, tokenizer, mask.json, report.json, run.json.")]
Calib = Annotated[str, typer.Option(help="Texts: a .txt file (a text per line), .jsonl[.gz], or the name of a dataset.")]
Config = Annotated[str | None, typer.Option(help="Configuration of the dataset.")]
Split = Annotated[str, typer.Option(help="Split of the dataset.")]
Column = Annotated[str, typer.Option(help="Column that holds the texts.")]
Tokens = Annotated[int | None, typer.Option(min=1, help="Calibration tokens; all if not given.")]
MaxLength = Annotated[int, typer.Option(min=1, help="Tokens per sequence.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Sequences per batch.")]
Pack = Annotated[bool, typer.Option("--pack", help="Join the texts and cut full sequences, as language models are trained.")]
MixedLengths = Annotated[bool, typer.Option(help="Take an encoder's long texts in pieces, from short to --max-length.")]
Keep = Annotated[float, typer.Option(callback=_share, help="Share of the --budget that stays, above 0, at most 1.")]
Criterion = Annotated[str, _one_of(CRITERIA, "What makes a head or neuron worth keeping")]
Scope = Annotated[str, _one_of(SCOPES, "Same share in every layer, or all compete")]
Budget = Annotated[str, typer.Option(callback=_budget, help=f"What --keep is a share of: {_BUDGETS}.")]
RoundTo = Annotated[int, typer.Option(min=1, help="Widths are multiples of so many channels, or whole.")]
Uniform = Annotated[bool, typer.Option("--uniform", help="The same widths in every layer, which the stock class can load.")]
Protect = Annotated[list[str], typer.Option(help="Site (heads.0) or number of a layer that stays whole; may be repeated.")]
Drop = Annotated[bool, typer.Option("--drop", help="A layer's whole attention or feed-forward part may go.")]
Length = Annotated[int, typer.Option(min=1, help="Tokens per sequence that is timed.")]
TimedBatch = Annotated[int, typer.Option("--batch-size", min=1, help="Sequences per batch that is timed.")]
Seed = Annotated[int, typer.Option(help="For --criterion random.")]
MaskFile = Annotated[Path, typer.Option(exists=True, dir_okay=False, help="JSON file with the mask.")]
Target = Annotated[str, _one_of(TARGETS, "What the kept channels are fitted to")]
Ridge = Annotated[str, typer.Option(callback=_ridge, help="auto, or a number relative to the mean diagonal of the Gram.")]
Refit = Annotated[bool, typer.Option(help="Fit the layers before the kept units to their dense output first.")]
Solver = Annotated[str, _one_of(SOLVERS, "How the least squares are solved")]
Bias = Annotated[str, _one_of(BIASES, "Keep biases as they are placed, or create missing ones")]
Dtype = Annotated[str, _one_of(DTYPES, "Of the weights")]
Device = Annotated[str, typer.Option(help="Where to run: cpu, cuda, …")]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it is there.")]
