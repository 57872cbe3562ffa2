"""Checks of options: each raises an `OptionError` that says what was expected."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from os import PathLike
from typing import Any

from liar.errors import OptionError, check_choice
from liar.options.choices import BUDGETS, GRANULARITIES, PLACES

# Larger counts do not fit where numbers of tokens and sequences are kept.
LARGEST_COUNT = 2**31 - 1
# Tokens of a text that a model writes: one at random, the next four greedily, and at least one that is sampled.
SHORTEST_GENERATED = 6
LARGEST_SEED = 2**62
# Of neighbouring inputs, for patterns such as 2:4.
LARGEST_GROUP = 64
# A larger ridge changes nothing, but for overflows.
LARGEST_RIDGE = 1e12


def shown(value: Any) -> str:
    """A value for an error."""
    try:
        return repr(value)
    except ValueError:  # Python does not write numbers of thousands of digits
        return "a huge number"


def is_number(value: Any, kind: type) -> bool:
    """Whether a value is a number of some kind, as Python or NumPy has it; True and False are none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def check_share(name: str, value: Any) -> None:
    """Raise an `OptionError` unless the value is a share above 0 and at most 1."""
    if not is_number(value, Real) or not 0 < value <= 1:
        raise OptionError(f"{name}={shown(value)}: expected the share that stays, above 0 and at most 1")


def check_count(name: str, value: Any) -> None:
    """Raise an `OptionError` unless the value is an integer from 1 to `LARGEST_COUNT`."""
    if not is_number(value, Integral) or not 1 <= int(value) <= LARGEST_COUNT:
        raise OptionError(f"{name}={shown(value)}: expected a whole number, at least 1 and at most {LARGEST_COUNT:,}")


def check_generated_length(name: str, value: Any) -> None:
    """Raise an `OptionError` unless the value is a count that leaves a token to be sampled."""
    check_count(name, value)
    if value < SHORTEST_GENERATED:
        raise OptionError(
            f"{name}={shown(value)}: expected at least {SHORTEST_GENERATED}: one random token, the next "
            f"{SHORTEST_GENERATED - 2} greedily, and one that is sampled"
        )


def check_optional_count(name: str, value: Any) -> None:
    """Raise an `OptionError` unless the value is None or an integer of at least 1."""
    if value is not None:
        check_count(name, value)


def check_integer(name: str, value: Any) -> None:
    """Raise an `OptionError` unless the value is an integer that a random generator takes as its seed."""
    if not is_number(value, Integral) or abs(int(value)) > LARGEST_SEED:
        raise OptionError(f"{name}={shown(value)}: expected a whole number of at most 62 bits")


def check_flag(name: str, value: Any) -> None:
    """Raise an `OptionError` unless the value is True or False, of Python or of NumPy."""
    if type(value).__name__ not in ("bool", "bool_"):
        raise OptionError(f"{name}={value!r}: expected True or False")


def check_text(name: str, value: Any) -> None:
    """Raise an `OptionError` unless the value is a text that is not empty."""
    if not isinstance(value, str) or not value:
        raise OptionError(f"{name}={value!r}: expected a text, got a {type(value).__name__}")


def check_optional_text(name: str, value: Any) -> None:
    """Raise an `OptionError` unless the value is None or a text."""
    if value is not None:
        check_text(name, value)


def check_optional_path(name: str, value: Any) -> None:
    """Raise an `OptionError` unless the value is None or names a folder."""
    if value is not None and not isinstance(value, PathLike):
        check_text(name, value)


def check_rate(name: str, value: Any) -> None:
    """Raise an `OptionError` unless the value is a learning rate: a number above 0 and at most 1."""
    if not is_number(value, Real) or not 0 < value <= 1:
        raise OptionError(f"{name}={shown(value)}: expected a learning rate, above 0 and at most 1")


def check_part(name: str, value: Any) -> None:
    """Raise an `OptionError` unless the value is a share from 0 to 1."""
    if not is_number(value, Real) or not 0 <= value <= 1:
        raise OptionError(f"{name}={shown(value)}: expected a share from 0 to 1")


def check_granularity(name: str, value: Any) -> None:
    """Raise an `OptionError` unless the value names a granularity or is a number of blocks."""
    if is_number(value, Integral):
        check_count(name, value)
    elif not isinstance(value, str) or value not in GRANULARITIES:
        expected = f"one of {', '.join(map(repr, GRANULARITIES))}, or a number of blocks"
        raise OptionError(f"{name}={shown(value)}: expected {expected}")


def check_ridge(name: str, value: Any) -> None:
    """Raise an `OptionError` unless the value is "auto" or a number from 0 to `LARGEST_RIDGE`."""
    automatic = isinstance(value, str) and value == "auto"
    if not automatic and (not is_number(value, Real) or not 0 <= value <= LARGEST_RIDGE):
        expected = f'"auto" or a number >= 0, at most {LARGEST_RIDGE:g} (relative to the mean diagonal of the Gram)'
        raise OptionError(f"{name}={shown(value)}: expected {expected}")


def check_sparsity(name: str, value: Any) -> None:
    """Raise an `OptionError` unless the value is a share above 0 and below 1, or a pattern such as "2:4"."""
    if isinstance(value, str):
        kept, _, group = value.partition(":")
        if kept.isdecimal() and group.isdecimal() and 0 < int(kept) < int(group) <= LARGEST_GROUP:
            return
    elif is_number(value, Real) and 0 < value < 1:
        return
    raise OptionError(
        f"{name}={shown(value)}: expected the share of weights that is removed, above 0 and below 1, or a pattern such as "
        f'"2:4" (2 of 4 neighbouring inputs stay; groups of at most {LARGEST_GROUP})'
    )


def check_quality(name: str, value: Any) -> None:
    """Raise an `OptionError` unless the value is "auto" or an integer from 0 to `LARGEST_COUNT`."""
    automatic = isinstance(value, str) and value == "auto"
    if not automatic and (not is_number(value, Integral) or not 0 <= int(value) <= LARGEST_COUNT):
        raise OptionError(
            f'{name}={shown(value)}: expected "auto" or a number of sequences, from 0 (none) to {LARGEST_COUNT:,}'
        )


def check_activations(name: str, value: Any) -> None:
    """Raise an `OptionError` unless the value is None or names a place."""
    if value is not None:
        check_choice(name, value, PLACES)


def check_budget(name: str, value: Any) -> None:
    """Raise an `OptionError` unless the value names a budget, or may be costs."""
    # `Costs`, which cannot be imported here, or their content in a run.json.
    if not isinstance(value, Mapping) and not hasattr(type(value), "unit_costs"):
        check_choice(name, value, BUDGETS)


def is_iterable(value: Any) -> bool:
    """Whether a loop can go over a value; of an array without dimensions its class says so, wrongly."""
    try:
        iter(value)
    except TypeError:
        return False
    return True


def check_list(name: str, value: Any, of: str = "names") -> None:
    """Raise an `OptionError` if a text was given in place of a list of texts: its letters would be taken one by one."""
    # An iterator would be used up by the time it is needed.
    if isinstance(value, (str, bytes)) or not is_iterable(value) or iter(value) is value:
        raise OptionError(f"{name}={value!r}: expected a list of {of}, got a {type(value).__name__}")


def check_names(name: str, value: Any) -> None:
    """Raise an `OptionError` unless the value lists names of sites and numbers of layers."""
    check_list(name, value, of="names of sites and numbers of layers")
    for each in value:
        if not isinstance(each, str) and not is_number(each, Integral):
            raise OptionError(f"{name}: expected names of sites and numbers of layers, got {each!r}")
