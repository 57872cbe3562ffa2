"""Command-line parameters made from `liar.options`: names, defaults, help and checks stand there and nowhere else."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from liar.errors import LiarError, OptionError
from liar.files import user_path
from liar.options import BUDGETS, Option, options_in

Model = Annotated[str, typer.Argument(help="Model folder, or a name on the hub.")]
Out = Annotated[Path, typer.Argument(help="Folder to write: model, tokenizer, mask.json, report.json, run.json.")]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it is there.")]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Keep finished blocks in OUT.run, and go on from what an earlier call left there."),
]
MaskFile = Annotated[Path, typer.Option(exists=True, dir_okay=False, help="JSON file with the mask.")]

BUDGET_HELP = f"{', '.join(BUDGETS)}, or a file that liar latency wrote"


def _automatic(number: Callable[[str], Any]) -> Callable[[str], Any]:
    """A reader of `auto` or a number."""

    def read(value: str) -> Any:
        try:
            return value if value == "auto" else number(value)
        except ValueError as error:
            raise OptionError(f"expected auto or a number >= 0, got {value!r}") from error

    return read


def _budget(value: str) -> str:
    if value not in BUDGETS and not user_path(value).is_file():
        raise OptionError(f"expected {BUDGET_HELP}; got {value!r}")
    return value


def _protect(value: Sequence[str]) -> list[str | int]:
    return [int(name) if name.isdecimal() else name for name in value]


def _granularity(value: str) -> int | str:
    return int(value) if value.isdecimal() else value


# What the command line reads where Python takes more than text: type, text -> value.
READERS: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "ridge": (str, _automatic(float)),
    "quality": (str, _automatic(int)),
    "budget": (str, _budget),
    "protect": (list[str], _protect),
    "granularity": (str, _granularity),
    "run_folder": (str | None, lambda value: value),
}

# Read, but not yet what the library takes: a file's name in place of costs, texts that may be left out.
UNCHECKED = ("budget", "calib")


def with_options(*groups: type, optional: Sequence[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a subcommand that takes `**options` a parameter for every option of some classes of `liar.options`.

    Args:
        groups: the classes.
        optional: options without a default that may be left out here, and are None then.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [each for each in inspect.signature(command).parameters.values() if each.kind is not each.VAR_KEYWORD]
        hints = get_type_hints(command, include_extras=True)
        own = [each.replace(annotation=hints[each.name]) for each in own]
        added = [
            _parameter(each, option, types[each.name], required=each.name not in optional)
            for group in groups
            for types in [get_type_hints(group)]
            for each, option in options_in(group)
        ]
        flags = [each for each in own if each.default is not each.empty]
        ordered = [*(each for each in own if each not in flags), *added, *flags]
        parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in ordered]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        return command

    return decorate


def _parameter(each: Field[Any], option: Option, kind: Any, *, required: bool) -> inspect.Parameter:
    kind, read = READERS.get(each.name, (kind, None))
    default = inspect.Parameter.empty if each.default is MISSING else each.default
    if default is inspect.Parameter.empty and not required:
        kind, default = kind | None, None
    if isinstance(default, tuple):
        default = list(default)
    annotation = Annotated[kind, typer.Option(callback=_checked(each.name, option, read), help=_help(each.name, option))]
    return inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _help(name: str, option: Option) -> str:
    if name == "budget":
        return f"{option.help} One of {BUDGET_HELP}."
    if name == "granularity":
        return f"{option.help} One of {', '.join(option.choices or ())}, or a number."
    return f"{option.help} One of {', '.join(option.choices)}." if option.choices else option.help


def _checked(name: str, option: Option, read: Callable[[Any], Any] | None) -> Callable[[Any], Any]:
    """A callback that reads and checks a value; what is wrong with it is wrong usage."""

    def check(value: Any) -> Any:
        try:
            value = read(value) if read else value
            if name not in UNCHECKED:
                option.validate(name, value)
        except LiarError as error:
            raise typer.BadParameter(str(error)) from error
        return value

    return check
