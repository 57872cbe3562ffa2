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
    """The model cannot be processed as it is: on the meta device, quantised, or of an unknown family.

    Example:
        >>> try:
        ...     liar.prune(torch.nn.Linear(2, 2), calib, keep=0.5)
        ... except liar.errors.ModelError as error:
        ...     print(error)
        expected a model of a known family, got a Linear without config.model_type; ...
    """


class MaskError(LiarError):
    """The mask does not fit the model's sites.

    Example:
        >>> try:
        ...     liar.remove(model, {"heads.9": [0]})
        ... except liar.errors.MaskError as error:
        ...     print(error)
        mask['heads.9']: no such site in this model; expected ...
    """


class CalibrationError(LiarError):
    """The calibration data cannot be used: empty, all padding, not what the model takes, or not finite inside it.

    Example:
        >>> try:
        ...     liar.prune(model, [], keep=0.5)
        ... except liar.errors.CalibrationError as error:
        ...     print(error)
        the calibration data is empty: expected at least one batch, got none (a used-up generator?)
    """


class BudgetError(LiarError):
    """The requested budget cannot be met.

    Example:
        >>> try:
        ...     liar.select(model, keep=0.001, criterion="magnitude")
        ... except liar.errors.BudgetError as error:
        ...     print(error)
        keep=0.001 cannot be met: the least that is possible is 0.1527 of the parameters, with ...
    """


class OptionError(LiarError):
    """An option has a value that is not among the possible ones.

    Example:
        >>> try:
        ...     liar.select(model, keep=0.5, criterion="guess")
        ... except liar.errors.OptionError as error:
        ...     print(error)
        criterion='guess' is not known; expected one of ...
    """


class CheckpointError(LiarError):
    """A folder or file cannot be read or must not be written.

    Example:
        >>> from pathlib import Path
        >>> Path("empty").mkdir()
        >>> try:
        ...     liar.load("empty")
        ... except liar.errors.CheckpointError as error:
        ...     print(error)
        empty: expected a model folder with a readable config.json...
    """


class ProcessError(LiarError):
    """Another process of the run has failed, or is gone.

    Example:
        >>> print(liar.errors.ProcessError("process 1 of 2: [Errno 28] No space left on device"))
        process 1 of 2: [Errno 28] No space left on device
    """


@contextmanager
def at_site(name: str, module: str) -> Iterator[None]:
    """Add the name of the site to a `CalibrationError` raised inside, unless another process has named it."""
    try:
        yield
    except CalibrationError as error:
        where = f"{name} ({module}): "
        if where in str(error):
            raise
        raise CalibrationError(f"{where}{error}") from error


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
