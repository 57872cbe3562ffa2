"""Reading activations and replaying known ones, through hooks that are always removed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from liar.errors import ModelError


class StopForward(Exception):
    """Ends a forward pass early: everything that was asked for has been captured."""


@dataclass(frozen=True)
class Point:
    """What to capture: a positional argument of a module's forward, by its index, or its output where that is None."""

    module: nn.Module
    argument: int | None


@contextmanager
def capture_activations(points: Mapping[str, Point], *, stop: bool = False) -> Iterator[dict[str, Tensor]]:
    """Fill a dict with the activations at some points in the next forward pass.

    Args:
        points: name -> what to capture.
        stop: end the forward pass with `StopForward` as soon as all points were captured (`run_block` catches it).
    """
    activations: dict[str, Tensor] = {}
    with receive_activations(points, activations.__setitem__, stop=stop):
        yield activations


@contextmanager
def receive_activations(
    points: Mapping[str, Point], receive: Callable[[str, Tensor], object], *, stop: bool = False
) -> Iterator[None]:
    """Call a function with every activation of the next forward pass, as soon as it is there: not all have to be kept.

    Args:
        points: name -> what to capture.
        receive: takes the name of a point and its activation.
        stop: as for `capture_activations`.

    Raises:
        ModelError: a point was passed twice.
        Exception: whatever the function raises, also where whoever runs the model has made something else of it.
    """
    received: set[str] = set()
    raised: list[Exception] = []

    def note(name: str, value: Tensor) -> None:
        if name in received:
            raise ModelError(
                f"{name}: the layer ran twice in one pass of its block; chunked feed-forward (chunk_size_feed_forward) and "
                "shared layers are not supported: set the chunk size to 0"
            )
        received.add(name)
        try:
            receive(name, value)
        except Exception as error:
            raised.append(error)
            raise
        if stop and len(received) == len(points):
            raise StopForward

    handles = []
    try:
        for name, point in points.items():
            if point.argument is None:
                hook = lambda _module, _args, output, name=name: note(name, output)  # noqa: E731
                handles.append(point.module.register_forward_hook(hook))
            else:
                before = lambda _module, args, name=name, i=point.argument: note(name, args[i])  # noqa: E731
                handles.append(point.module.register_forward_pre_hook(before))
        yield
    except Exception as error:
        if raised and error is not raised[0]:
            raise raised[0] from None
        raise
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replay_output(module: nn.Module, output: Any) -> Iterator[None]:
    """Let a module return a known output instead of computing it."""
    before = vars(module).get("forward")
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
