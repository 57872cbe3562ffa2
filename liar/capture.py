"""Running a model block by block and looking inside: hooks that are always removed, streams, the guest's state restored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from liar.errors import CalibrationError, LiarError, ModelError


class _Reached(Exception):
    """Everything that was wanted from a forward pass has been seen."""


@dataclass(frozen=True)
class Point:
    """A place to look at: a module, and the index of a positional argument of its forward, or None for its output."""

    module: nn.Module
    argument: int | None


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; training flags and the random state are restored whatever happens."""
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def watching(points: Mapping[str, Point], *, stop_after: int | None = None) -> Iterator[dict[str, Tensor]]:
    """Fill a dict with what passes the points in the next forward pass.

    Args:
        points: name -> where to look.
        stop_after: break off the forward pass as soon as so many points were seen (see `run`).
    """
    seen: dict[str, Tensor] = {}

    def note(name: str, value: Tensor) -> None:
        if name in seen:
            raise ModelError(
                f"{name}: the layer ran twice in one pass of its block; chunked feed-forward (chunk_size_feed_forward) and "
                "shared layers are not supported: set the chunk size to 0"
            )
        seen[name] = value
        if stop_after is not None and len(seen) == stop_after:
            raise _Reached

    handles = []
    try:
        for name, point in points.items():
            if point.argument is None:
                hook = lambda _module, _args, output, name=name: note(name, output)  # noqa: E731
                handles.append(point.module.register_forward_hook(hook))
            else:
                before = lambda _module, args, name=name, i=point.argument: note(name, args[i])  # noqa: E731
                handles.append(point.module.register_forward_pre_hook(before))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaying(module: nn.Module, output: Any) -> Iterator[None]:
    """Let a module hand out a known output instead of computing it."""
    assert "forward" not in vars(module), "only modules of our own copies are replayed, and one at a time"
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del module.forward


@dataclass(frozen=True)
class Call:
    """How a model calls one of its blocks for one batch: everything but the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def run(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """Run a block: hidden states in, hidden states out (those that came in if `watching` broke it off)."""
    try:
        output = block(hidden, *call.args, **call.kwargs)
    except _Reached:
        return hidden
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor)
    return hidden


def run_model(base: nn.Module, batch: Mapping[str, Any], number: int = 0) -> Any:
    """Run the bare model, or the model with its head, on a calibration batch; what it says.

    Raises:
        CalibrationError: the model does not take the batch.
    """
    try:
        return base(**batch)
    except (_Reached, LiarError):
        raise
    except Exception as error:
        shapes = {name: list(value.shape) for name, value in batch.items() if isinstance(value, Tensor)}
        raise CalibrationError(
            f"{type(base).__name__} does not take calibration batch {number} with {shapes}: {error}"
        ) from error


def block_calls(
    base: nn.Module, blocks: Sequence[nn.Module], batches: Sequence[Mapping[str, Tensor]]
) -> tuple[list[Tensor], list[list[Call]]]:
    """What enters the first block for every batch, and how every block is called: (hidden [batch], calls [block][batch]).

    The blocks themselves do not run: for this pass each only notes its arguments and hands the hidden states on.

    Raises:
        CalibrationError: the model does not take a batch.
    """
    entering: list[Tensor] = []
    calls: list[list[Call]] = [[] for _ in blocks]

    def recorder(index: int) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if index == 0:
                entering.append(hidden_states)
            calls[index].append(Call(args, kwargs))
            if index == len(blocks) - 1:
                raise _Reached
            return hidden_states

        return forward

    owned = [vars(block).get("forward") for block in blocks]
    try:
        for index, block in enumerate(blocks):
            block.forward = recorder(index)
        for number, batch in enumerate(batches):
            try:
                run_model(base, batch, number)
            except _Reached:
                continue
            raise ModelError(f"{type(base).__name__} did not call its last block; the family's table names the wrong blocks")
    finally:
        for block, forward in zip(blocks, owned, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward
    return entering, calls
