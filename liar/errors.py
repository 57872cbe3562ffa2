"""What can go wrong, said in one place: the kinds of error and the texts of every verdict."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path


class LiarError(ValueError):
    """Base of every error this library raises on purpose; the user's model is then as it was before the call.

    Example:
        >>> try:
        ...     liar.reconstruct(model, {"heads.0": []}, calib)
        ... except liar.LiarError as error:
        ...     print(type(error).__name__, str(error)[:24])
        MaskError mask of heads.0 (encoder
    """


class ModelError(LiarError):
    """The model cannot be worked on as it is: on the meta device, quantised, or of an unknown family."""


class MaskError(LiarError):
    """The mask does not fit the model's sites."""


class CalibrationError(LiarError):
    """The calibration data cannot be used: empty, all padding, not what the model takes, or not finite inside it."""


@contextmanager
def at_site(name: str, module: str) -> Iterator[None]:
    """Say at which site the calibration data was of no use."""
    try:
        yield
    except CalibrationError as error:
        raise CalibrationError(f"{name} ({module}): {error}") from error


@contextmanager
def reading(kind: type[LiarError], expected: str, path: str | Path | None = None) -> Iterator[None]:
    """Say what was expected of a text, or of the file it is in, if the content is something else."""
    where = "" if path is None else f"{path}: "
    try:
        yield
    except kind as error:
        raise kind(f"{where}{error}") from error
    except OSError as error:
        raise kind(f"{where}expected {expected}, got {error.strerror or error}; check the path") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise kind(f"{where}expected {expected}, got {error!r}") from error


class BudgetError(LiarError):
    """The wanted budget cannot be met."""


class OptionError(LiarError):
    """An option has a value that is not among the possible ones."""


class CheckpointError(LiarError):
    """A folder cannot be read or must not be written."""


class Verdict(str, Enum):
    """How the solve of one site ended. The value is a short name, `text` says what it means.

    Example:
        >>> Verdict.RANK_DEFICIENT.text
        'the kept channels are linearly dependent on this data: minimum-norm change of the kept weights'
    """

    OK = "ok"
    RIDGED = "ridged"
    RANK_DEFICIENT = "rank_deficient"
    TOO_FEW_TOKENS = "too_few_tokens"
    KEPT_BASELINE = "kept_baseline"
    UNTOUCHED = "untouched"
    DROPPED = "dropped"

    @property
    def text(self) -> str:
        """One sentence for people."""
        return _TEXTS[self]


_TEXTS = {
    Verdict.OK: "plain least squares",
    Verdict.RIDGED: "least squares with a ridge toward the kept weights",
    Verdict.RANK_DEFICIENT: ("the kept channels are linearly dependent on this data: minimum-norm change of the kept weights"),
    Verdict.TOO_FEW_TOKENS: "fewer calibration tokens than kept channels: the answer leans on the ridge; use more text",
    Verdict.KEPT_BASELINE: "no update was better on held-out tokens: the kept weights stay, at most the bias moves",
    Verdict.UNTOUCHED: "everything is kept and nothing before it changed: the layer stays as it is",
    Verdict.DROPPED: "the whole sub-layer went: what is left of it is the consumer's bias, where there is one",
}


def choose(option: str, value: str, possible: tuple[str, ...] | list[str]) -> str:
    """Return `value` if it is among `possible`, else raise an `OptionError` that lists them."""
    if value not in possible:
        raise OptionError(f"{option}={value!r} is not known; expected one of {', '.join(map(repr, possible))}")
    return value
