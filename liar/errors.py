"""The kinds of error this library raises, and helpers that turn foreign errors into them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Characters of a message.
LONGEST = 1500


class LiarError(ValueError):
    """Base of every error this library raises on purpose; the user's model is then as it was before the call.

    Example:
        >>> try:
        ...     liar.reconstruct(model, {"heads.0": []}, calib)
        ... except liar.LiarError as error:
        ...     print(type(error).__name__, str(error)[:24])
        MaskError mask of heads.0 (encoder
    """

    def __init__(self, message: str) -> None:
        # Foreign errors quote whole files, and names can be of any length: what a person reads fits on a screen.
        super().__init__(message if len(message) <= LONGEST else f"{message[: LONGEST // 2]} … {message[-LONGEST // 3 :]}")


class ModelError(LiarError):
    """The model cannot be processed as it is: on the meta device, quantised, or of an unknown family."""


class MaskError(LiarError):
    """The mask does not fit the model's sites."""


class CalibrationError(LiarError):
    """The calibration data cannot be used: empty, all padding, not what the model takes, or not finite inside it."""


class BudgetError(LiarError):
    """The requested budget cannot be met."""


class OptionError(LiarError):
    """An option has a value that is not among the possible ones."""


class CheckpointError(LiarError):
    """A folder or file cannot be read or must not be written."""


@contextmanager
def at_site(name: str, module: str) -> Iterator[None]:
    """Add the name of the site to a `CalibrationError` raised inside."""
    try:
        yield
    except CalibrationError as error:
        raise CalibrationError(f"{name} ({module}): {error}") from error


@contextmanager
def wrap_parse_errors(kind: type[LiarError], expected: str, path: str | Path | None = None) -> Iterator[None]:
    """Turn whatever parsing a text or file raises into an error of one kind that says what was expected."""
    where = "" if path is None else f"{path}: "
    try:
        yield
    except kind as error:
        raise kind(f"{where}{error}") from error
    except KeyError as error:
        raise kind(f"{where}expected {expected}, got one without {error}: is it another file?") from error
    except OSError as error:
        raise kind(f"{where}expected {expected}, got {error.strerror or error}; check the path") from error
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise kind(f"{where}expected {expected}, got {error!r}") from error


def check_choice(option: str, value: object, choices: Iterable[str]) -> None:
    """Raise an `OptionError` that lists the choices unless `value` is one of them."""
    choices = list(choices)
    if not isinstance(value, str) or value not in choices:
        raise OptionError(f"{option}={value!r} is not known; expected one of {', '.join(map(repr, choices))}")
