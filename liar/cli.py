"""The command line: it turns options into a `Run`, carries it out, and says in one paragraph what is wrong."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler

from liar import arguments as arg
from liar import checkpoint, families
from liar.api import BUDGETS
from liar.atomic import check_file
from liar.costs import LENGTH, Costs
from liar.errors import LiarError, MaskError, reading
from liar.report import Report
from liar.run import Run
from liar.timing import latency

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False, add_completion=False)


def main() -> None:
    """The console script: exit code 0, 1 for unusable input, 2 for wrong usage."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(" ".join(f"{name} {number}" for name, number in checkpoint.versions().items()))
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show versions.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Tell more of what is done.")] = False,
) -> None:
    """Make a pruned transformer work again without training."""
    log = logging.getLogger("liar")
    log.handlers = [RichHandler(console=Console(stderr=True), show_path=False)]
    log.setLevel(logging.INFO if verbose else logging.WARNING)


@app.command()
def prune(
    model: arg.Model,
    out: arg.Out,
    keep: arg.Keep,
    calib: arg.Calib,
    criterion: arg.Criterion = Run.criterion,
    scope: arg.Scope = Run.scope,
    budget: arg.Budget = str(Run.budget),
    round_to: arg.RoundTo = Run.round_to,
    uniform: arg.Uniform = Run.uniform,
    protect: arg.Protect = [],  # noqa: B006 (typer reads it and never changes it)
    drop: arg.Drop = Run.drop,
    seed: arg.Seed = Run.seed,
    target: arg.Target = Run.target,
    ridge: arg.Ridge = str(Run.ridge),
    refit: arg.Refit = Run.refit,
    solver: arg.Solver = Run.solver,
    bias: arg.Bias = Run.bias,
    config: arg.Config = None,
    split: arg.Split = Run.split,
    column: arg.Column = Run.column,
    tokens: arg.Tokens = None,
    max_length: arg.MaxLength = Run.max_length,
    batch_size: arg.BatchSize = Run.batch_size,
    pack: arg.Pack = False,
    mixed_lengths: arg.MixedLengths = True,
    dtype: arg.Dtype = Run.dtype,
    device: arg.Device = Run.device,
    force: arg.Force = False,
) -> None:
    """Choose what stays, remove the rest, and repair the model by least squares.

    For example:

        liar prune bert-base-uncased slim --keep 0.5 --calib texts.txt

        liar prune ./llama slim --keep 0.7 --scope global --calib wikitext --config wikitext-2-raw-v1 --pack --tokens 100000

        liar prune bert-base-uncased slim --keep 0.5 --budget latency.json --calib texts.txt
    """
    _run("prune", locals())


@app.command("latency")
def time_widths(
    model: arg.Model,
    out: Annotated[Path, typer.Argument(help="JSON file to write, for --budget.")],
    batch_size: arg.TimedBatch = 1,
    length: arg.Length = LENGTH,
    dtype: arg.Dtype = Run.dtype,
    device: arg.Device = Run.device,
    force: arg.Force = False,
) -> None:
    """Time the layers of a model at several widths on this machine, as a budget for prune.

    For example:

        liar latency bert-base-uncased latency.json --batch-size 8 --length 128
    """
    with _told():
        check_file(out, overwrite=force)
        loaded = checkpoint.load(model, dtype=dtype).to(device)  # type: ignore[arg-type]
        costs = latency(loaded, batch_size=batch_size, length=length)
        costs.save(out)
        typer.echo(f"{costs.dense * 1000:.1f} ms per batch; written to {out}")


@app.command()
def reconstruct(
    model: arg.Model,
    out: arg.Out,
    mask: arg.MaskFile,
    calib: arg.Calib,
    drop: arg.Drop = Run.drop,
    target: arg.Target = Run.target,
    ridge: arg.Ridge = str(Run.ridge),
    refit: arg.Refit = Run.refit,
    solver: arg.Solver = Run.solver,
    bias: arg.Bias = Run.bias,
    config: arg.Config = None,
    split: arg.Split = Run.split,
    column: arg.Column = Run.column,
    tokens: arg.Tokens = None,
    max_length: arg.MaxLength = Run.max_length,
    batch_size: arg.BatchSize = Run.batch_size,
    pack: arg.Pack = False,
    mixed_lengths: arg.MixedLengths = True,
    dtype: arg.Dtype = Run.dtype,
    device: arg.Device = Run.device,
    force: arg.Force = False,
) -> None:
    """Remove what a mask removes, and repair the model by least squares.

    For example:

        liar reconstruct bert-base-uncased slim --mask mask.json --calib texts.txt

        liar reconstruct ./llama slim --mask mask.json --calib texts.jsonl.gz --column body --target same_input
    """
    _run("reconstruct", locals())


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A run.json that an earlier run wrote.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write; that of the earlier run if not given.")] = None,
    force: arg.Force = False,
) -> None:
    """Do an earlier run again, from its run.json.

    For example:

        liar replay slim/run.json --out again
    """
    with _told():
        earlier = Run.from_json(run.read_text(encoding="utf-8"))
        _finish(replace(earlier, out=str(out)) if out else earlier, force=force)


@app.command()
def report(
    source: Annotated[Path, typer.Argument(help="Folder that a run wrote, or a report.json.")],
    plot: Annotated[Path | None, typer.Option(help="Write a figure to this file (.png, .pdf, .svg).")] = None,
) -> None:
    """Show what a run kept and how large the errors are, before and after.

    For example:

        liar report slim

        liar report slim/report.json --plot slim.png
    """
    with _told():
        found = Report.load(source / "report.json" if source.is_dir() else source)
        if plot:
            from liar.plots import plot as draw  # noqa: PLC0415 (an extra)

            draw(found, plot)
        typer.echo(str(found))


@app.command("families")
def show_families() -> None:
    """List the families of models that can be pruned.

    For example:

        liar families
    """
    for family in families.registered():
        typer.echo(f"{family.model_type:12} {family.note}")


@contextmanager
def _told() -> Iterator[None]:
    """Say what is wrong with the input in one paragraph on stderr, and end with code 1; other errors are ours, and show."""
    try:
        yield
    except (LiarError, OSError, ImportError) as error:
        typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from error


def _run(command: str, options: Mapping[str, Any]) -> None:
    """Carry out a subcommand; `options` are its parameters by name, which are those of `Run`."""
    given = dict(options)
    force = given.pop("force")
    with _told():
        if "mask" in given:
            given["mask"] = _read_mask(given["mask"])
        if given["ridge"] != "auto":
            given["ridge"] = float(given["ridge"])
        if given.get("budget") not in (None, *BUDGETS):
            given["budget"] = json.loads(Costs.load(given["budget"]).to_json())
        if "protect" in given:
            given["protect"] = [int(name) if name.isdigit() else name for name in given["protect"]]
        # A run.json has to work from anywhere.
        given |= {name: str(Path(given[name]).resolve()) for name in ("model", "calib") if Path(given[name]).exists()}
        _finish(Run(command=command, **{**given, "out": str(given["out"].resolve())}), force=force)


def _finish(run: Run, *, force: bool) -> None:
    typer.echo(str(run.carry_out(force=force)))
    typer.echo(f"written to {run.out}")


def _read_mask(path: Path) -> Any:
    with reading(MaskError, "a JSON file with a mask, as Mask.save writes it", path):
        return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
