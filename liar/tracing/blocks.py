"""The list of transformer blocks: found by running the model once and looking at what calls what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from liar.data.batches import read_batches
from liar.errors import LiarError
from liar.models import base_and_prefix
from liar.runtime import preserve_model_state, run_model
from liar.tracing.findings import NotFoundError


@dataclass(frozen=True)
class _Call:
    """One call of a module of a list: its place there, its first positional argument and its (first) output."""

    index: int
    hidden: Any
    output: Any


def find_blocks(model: nn.Module, batch: Mapping[str, Any]) -> str:
    """The name of the `nn.ModuleList` of blocks, relative to the bare model.

    Its modules are alike, and are called once each, in order: each with the hidden states [sequences, length, channels] that
    the one before gave, as the first positional argument.

    Raises:
        NotFoundError: there is no such list, or more than one; it says what was seen of each.
    """
    base, _ = base_and_prefix(model)
    config: Any = getattr(model, "config", None)
    lists: dict[str, nn.ModuleList] = {
        name: module for name, module in base.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    }
    if any(parameter.is_meta for parameter in model.parameters()):
        raise NotFoundError("blocks", "the model is on the meta device: load it with its weights")
    try:
        with preserve_model_state(model), _recorded_calls(lists) as calls:
            run_model(base, read_batches([batch], model)[0][0])
    except LiarError as error:
        stacks = "; a model with an encoder and a decoder has two stacks of blocks: its table is written by hand"
        advice = stacks if getattr(config, "is_encoder_decoder", False) else ""
        raise NotFoundError("blocks", f"the model does not run on the batch: {error}{advice}") from error
    unlike = {name: reason for name, modules in lists.items() if (reason := _why_not(modules, calls[name]))}
    found = [name for name in lists if name not in unlike]
    outer = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if len(outer) != 1:
        seen = "; ".join(f"{name}: {reason}" for name, reason in list(unlike.items())[:4]) or "no nn.ModuleList at all"
        several = f"several stacks of blocks: {', '.join(outer)}; such a table is written by hand (Family.decoder)"
        several = several if outer else f"none was found ({seen})"
        raise NotFoundError(
            "blocks", f"expected one nn.ModuleList whose modules are called in order with the hidden states, {several}"
        )
    return outer[0]


@contextmanager
def _recorded_calls(lists: Mapping[str, nn.ModuleList]) -> Iterator[dict[str, list[_Call]]]:
    calls: dict[str, list[_Call]] = {name: [] for name in lists}
    handles = []
    try:
        for name, modules in lists.items():
            for index, module in enumerate(modules):

                def note(_module: Any, args: Any, output: Any, name: str = name, index: int = index) -> None:
                    first = output[0] if isinstance(output, tuple) and output else output
                    calls[name].append(_Call(index, args[0] if args else None, first))

                handles.append(module.register_forward_hook(note))
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _why_not(modules: nn.ModuleList, calls: list[_Call]) -> str | None:
    """Why a list is not the list of blocks; None if it may be."""
    order = [call.index for call in calls]
    first = calls[0].hidden if calls else None
    if not calls:
        return "its modules are never called"
    if len(set(map(id, modules))) < len(modules) or (len(modules) < len(order) and set(order) == set(range(len(modules)))):
        return f"{len(modules)} modules are called {len(order)} times in one pass; blocks that layers share cannot be cut"
    if order != list(range(len(modules))):
        return "its modules are not called once each, in order"
    if not isinstance(first, Tensor):
        return "its modules get no tensor as first positional argument"
    if first.ndim != 3 or not first.is_floating_point():
        return f"its modules get a tensor {list(first.shape)}, expected hidden states [sequences, length, channels]"
    if unlike := {part for module in modules for part in _parts(modules[0]) ^ _parts(module)}:
        names = sorted(f"{name or 'the module'} ({kind.__name__})" for name, kind in unlike)
        return f"its modules are not alike: not all have {', '.join(names[:3])}"
    given = [first, *(call.output for call in calls[:-1])]
    same = all(_equal(call.hidden, before) for call, before in zip(calls, given, strict=True))
    if not same or not isinstance(calls[-1].output, Tensor) or calls[-1].output.shape != first.shape:
        return "its modules do not hand hidden states on from one to the next"
    return None


def _parts(module: nn.Module) -> set[tuple[str, type]]:
    return {(name, type(part)) for name, part in module.named_modules()}


def _equal(one: Any, other: Any) -> bool:
    return isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
