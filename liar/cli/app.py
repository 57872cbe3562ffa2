"""The application that the subcommands belong to: logging, versions, and errors as one paragraph."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from liar.cli.memory import map_large_tensors
from liar.cli.processes import be_silent, check_command, is_first
from liar.errors import LiarError
from liar.versions import versions

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False, add_completion=False)


def main() -> None:
    """The console script: exit code 0, 1 for unusable input, 2 for wrong usage. Of several processes the first one prints."""
    if not is_first():
        be_silent()
    app()


def _show_version(requested: bool) -> None:
    if requested:
        typer.echo(" ".join(f"{name} {number}" for name, number in versions().items()))
        raise typer.Exit


@app.callback()
def app_options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show versions.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log more of what is done.")] = False,
) -> None:
    """Make a pruned transformer work again without training.

    Several processes share prune, select and reconstruct, one on each GPU: torchrun --nproc-per-node 8 -m liar prune …
    """
    with report_errors():
        check_command(context.invoked_subcommand)
    map_large_tensors()
    log = logging.getLogger("liar")
    log.handlers = [RichHandler(console=Console(stderr=True), show_path=False)]
    log.setLevel(logging.CRITICAL if not is_first() else logging.INFO if verbose else logging.WARNING)


@contextmanager
def report_errors() -> Iterator[None]:
    """Print what is wrong with the input in one paragraph on stderr, and end with code 1; other errors are ours, and show."""
    try:
        yield
    except (LiarError, OSError, ImportError) as error:
        if is_first():
            typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from error
