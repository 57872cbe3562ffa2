"""The one property of the fuzz suite: a call gives a result or a `LiarError`, and an error leaves everything as it was.

`attempt` makes a call and checks that: of the models the whole state, of a folder every byte, and the random states,
gradient mode and default type of the process, which calls that succeed have to keep as well.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from liar import LiarError
from liar.testing import assert_same_state, model_state

# An error has to fit on a screen, and a call on tiny models has to come to an end.
LONGEST_MESSAGE = 2000
SECONDS = 10


class Refused:
    """Stands for the result of a call that raised a `LiarError`; `error` is that."""

    def __init__(self, error: LiarError):
        self.error = error


class _TooSlowError(BaseException):
    """Not an `Exception`, so that no handler in the library takes it for one of its own."""


def attempt(
    call: Callable[[], Any], *models: nn.Module, folder: Path | None = None, changes: bool = False, own: type = LiarError
) -> Any:
    """What a call returns, or `Refused`.

    Args:
        call: without arguments.
        models: that must be as before after an error, or in any case unless `changes`.
        folder: the same for everything in it.
        changes: whether a call that succeeds may change the models and the folder.
        own: a kind of exception, raised by the input itself, that may come through.
    """
    before = [_complete_state(model) for model in models]
    files, process = _contents(folder), _process_state()
    outcome: Any
    try:
        with _limited():
            outcome = call()
    except LiarError as error:
        outcome = Refused(error)
        _check_message(str(error))
    except own as error:
        outcome = Refused(error)
    _check_process(process)
    if isinstance(outcome, Refused) or not changes:
        for model, state in zip(models, before, strict=True):
            _assert_complete_state(model, state)
        assert_same_files(files, folder)
    return outcome


def _check_process(before: dict[str, Any]) -> None:
    after = _process_state()
    # The next input should not suffer from it.
    torch.set_default_device(None)
    for what, value in before.items():
        assert after[what] == value, f"{what} has changed"


def _check_message(message: str) -> None:
    assert message.strip(), "an error without a message"
    assert len(message) <= LONGEST_MESSAGE, f"a message of {len(message)} characters: {message[:200]}"


def assert_same_files(before: dict[str, Any], folder: Path | None) -> None:
    """Fail if a folder no longer holds just what `_contents` found."""
    after = _contents(folder)
    other = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    assert not other, f"files have changed: {other[:5]}"


def _complete_state(model: nn.Module) -> tuple[Any, ...]:
    """What `model_state` has, and all that is attached to a module by any name."""
    attached = {
        name: {
            key: (list(value) if isinstance(value, dict) else id(value) if isinstance(value, torch.Tensor) else None)
            for key, value in vars(module).items()
        }
        for name, module in model.named_modules()
    }
    buffers = {name: value.detach().clone() for name, value in model.named_buffers()}
    return model_state(model), attached, buffers, dict(vars(model.config)).keys()


def _assert_complete_state(model: nn.Module, before: tuple[Any, ...]) -> None:
    state, attached, buffers, entries = before
    assert_same_state(model, state)
    _, now, buffers_now, entries_now = _complete_state(model)
    for name, values in attached.items():
        different = [key for key in {**values, **now[name]} if values.get(key) != now[name].get(key)]
        assert values.keys() == now[name].keys(), f"{name}: attributes came or went: {values.keys() ^ now[name].keys()}"
        assert not different, f"{name}: {different} changed"
    torch.testing.assert_close(buffers_now, buffers, rtol=0, atol=0, equal_nan=True)
    assert entries == entries_now


def _process_state() -> dict[str, Any]:
    name, keys, *position = np.random.get_state()
    return {
        "torch's random state": torch.get_rng_state().numpy().tobytes(),
        "Python's random state": random.getstate(),
        "NumPy's random state": (name, keys.tobytes(), *position),
        "the gradient mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "the default type": torch.get_default_dtype(),
        "the default device": torch.get_default_device(),
        "the number of threads": torch.get_num_threads(),
        "the working directory": os.getcwd(),
    }


def _contents(folder: Path | None) -> dict[str, Any]:
    """Path below a folder -> what is there."""
    return {} if folder is None else {str(path.relative_to(folder)): _content(path) for path in folder.rglob("*")}


def _content(path: Path) -> Any:
    if path.is_symlink():
        return os.readlink(path)
    return (oct(path.stat().st_mode), path.read_bytes() if path.is_file() else "folder")


@contextmanager
def _limited() -> Iterator[None]:
    """Stop what takes too long."""

    def stop(*_: Any) -> None:
        raise _TooSlowError

    earlier = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    except _TooSlowError as error:
        torch.set_default_device(None)
        raise AssertionError(f"took more than {SECONDS} seconds") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)


def assert_runs(model: nn.Module, like: Sequence[int] | None = None) -> torch.Tensor:
    """Run a model on a few tokens: the output, which has to be finite (and of a shape, if one is given)."""
    state = torch.get_rng_state()
    with torch.no_grad():
        output = model(input_ids=torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]]), return_dict=True)
    torch.set_rng_state(state)
    first: torch.Tensor = next(iter(output.values()))
    assert first.isfinite().all(), "the outputs are not finite"
    assert like is None or list(first.shape) == list(like)
    return first
