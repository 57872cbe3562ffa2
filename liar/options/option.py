"""What is known of an option, and what all groups of options have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from fractions import Fraction
from typing import Any, TypeVar

import numpy as np

from liar.errors import check_choice

# Of several values; of sets the order is another in every process.
LISTS = (list, tuple, range, set, frozenset, np.ndarray)
Group = TypeVar("Group", bound="OptionGroup")


@dataclass(frozen=True)
class Option:
    """What is known of one option besides its name, type and default.

    Attributes:
        help: one sentence for people.
        choices: possible values with what each means; None where the values are not a few names.
        check: raises an `OptionError` for a bad value, given the option's name and the value; None where any value is good.
    """

    help: str
    choices: Mapping[str, str] | None = None
    check: Callable[[str, Any], None] | None = None

    def validate(self, name: str, value: Any) -> None:
        """Raise an `OptionError` unless the option, called `name`, may have this value."""
        if self.check:
            self.check(name, value)
        elif self.choices is not None:
            check_choice(name, value, self.choices)


def option(
    help: str,
    *,
    default: Any = MISSING,
    choices: Mapping[str, str] | None = None,
    check: Callable[[str, Any], None] | None = None,
) -> Any:
    """A field of a group of options, with what is known of it."""
    return field(default=default, metadata={"option": Option(help, choices, check)})


class OptionGroup:
    """Base of the classes below: frozen dataclasses whose fields are made by `_option`."""

    def check(self) -> None:
        """Raise an `OptionError` that names the first bad value."""
        for each, option in options_in(type(self)):
            option.validate(each.name, getattr(self, each.name))

    def checked(self: Group) -> Group:
        """The same options after `check`, with Python's numbers in place of NumPy's, which overflow."""
        self.check()
        own = {each.name: getattr(self, each.name) for each, _ in options_in(type(self))}
        plain = {name: value.item() for name, value in own.items() if isinstance(value, np.generic)}
        plain |= {name: float(value) for name, value in own.items() if isinstance(value, Fraction)}
        plain |= {name: _plain_tuple(value) for name, value in own.items() if isinstance(value, LISTS)}
        return replace(self, **plain)  # type: ignore[type-var]


def _plain_tuple(values: Any) -> tuple[Any, ...]:
    """Several values as a tuple, with Python's numbers in place of NumPy's."""
    plain = tuple(value.item() if isinstance(value, np.generic) else value for value in values)
    return tuple(sorted(plain, key=str)) if isinstance(values, set | frozenset) else plain


def option_of(each: Field[Any]) -> Option:
    """What is known of the option in a field of one of the classes above."""
    option: Option = each.metadata["option"]
    return option


def options_in(*groups: type) -> Iterator[tuple[Field[Any], Option]]:
    """The options of some classes, in order."""
    for group in groups:
        for each in fields(group):
            yield each, option_of(each)


def options_table(*groups: type) -> str:
    """A Markdown table of options, for the docs."""
    rows = ["| option | default | meaning |", "| --- | --- | --- |"]
    for each, option in options_in(*groups):
        default = "required" if each.default is MISSING else f"`{each.default!r}`"
        choices = "".join(f"<br>`{value}`: {meaning}" for value, meaning in (option.choices or {}).items())
        rows.append(f"| `{each.name}` | {default} | {option.help}{choices} |")
    return "\n".join(rows)
