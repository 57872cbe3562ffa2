"""The units that a consumer reads, and the layers that produce them: found by changing single channels.

In one run of a block on copies of one sequence, another output channel of a layer is changed in every copy, at one token. The
channels of the consumer's input that change with it belong to the same unit: one channel for a neuron. In attention, a channel
of a query reaches all channels of its head, through the softmax; a channel of a key, those of all heads that share it; and keys
and values reach later tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from liar.errors import ModelError
from liar.models import FusedProducer
from liar.models.layout import Kind
from liar.runtime import Point, capture_activations, replay_output, run_block
from liar.tracing.findings import NotFoundError
from liar.tracing.small import LENGTH, PROBES, Probe
from liar.tracing.trace import Trace

# Changes smaller than this, relative to the largest value, are rounding.
ROUNDING = 1e-6
MOST_PARTS = 4
# The token that is changed: one with a token before it, for queries, and others after it, where keys and values act.
TOKEN = 1


@dataclass(frozen=True)
class Units:
    """The units of one consumer.

    Attributes:
        kind: of the units.
        consumer: name of the layer that reads them.
        producers: layers that compute them, as in a table.
        head: channels of one query head at the consumer's input; 1 for neurons.
        heads: query heads that share a key and value head; 1 for neurons.
    """

    kind: Kind
    consumer: str
    producers: tuple[str | FusedProducer, ...]
    head: int
    heads: int


@dataclass(frozen=True)
class Effect:
    """What happens if single output channels of a layer are changed.

    Attributes:
        size: output channels of the layer.
        tried: the channels that were changed, [copies].
        changed: linear layer -> which values of its input changed, bool [copies, tokens, channels].
    """

    size: int
    tried: Tensor
    changed: Mapping[str, Tensor]

    def feeds(self, name: str) -> bool:
        """Whether the input of a layer changed."""
        return bool(self.changed[name].any())

    def mixes_tokens(self, consumer: str) -> bool:
        """Whether the input of a layer changed at other tokens."""
        return bool(self.changed[consumer].any(2).any(0)[torch.arange(LENGTH) != TOKEN].any())

    def reached(self, consumer: str) -> tuple[Tensor, Tensor]:
        """The tried channels that reach a layer, [n]; the first and last channel of its input that each reaches, and how many.

        The latter are [n, 3].
        """
        rows = self.changed[consumer].any(1).long()
        effective = rows.any(1)
        rows = rows[effective]
        first, last = rows.argmax(1), rows.shape[1] - 1 - rows.flip(1).argmax(1)
        return self.tried[effective], torch.stack([first, last, rows.sum(1)], 1)


def find_effects(probe: Probe, trace: Trace, consumers: Sequence[str]) -> dict[str, Effect]:
    """The effects of all linear layers of a block but the consumers, whose outputs are held fixed."""
    names = [name for name in trace.inputs if name in trace.outputs and name not in consumers]
    return {name: _effect(probe, trace, name, consumers) for name in names}


def find_units(trace: Trace, consumer: str, effects: Mapping[str, Effect]) -> Units:
    """The units that a consumer reads.

    Raises:
        NotFoundError: it has no producers, or their channels are not in units; says what was seen.
    """
    effects = {name: effect for name, effect in effects.items() if effect.feeds(consumer)}
    if not effects:
        raise NotFoundError(f"producers of {consumer}", "no linear layer of the block changes its input")
    # What feeds another of them is no producer: it reaches all units.
    inner = {name: [other for other in effects if other != name and effect.feeds(other)] for name, effect in effects.items()}
    producers = [name for name in effects if not inner[name]]
    through = [f"{name} reaches it through {others[0]} as well" for name, others in inner.items() if others]
    seen = "; ".join([f"the layers that it reads are {', '.join(producers)}", *through])
    channels = trace.inputs[consumer].shape[-1]
    spans = torch.cat([effects[name].reached(consumer)[1] for name in producers])
    width, mixing = _unit_width(spans, channels), [name for name in producers if effects[name].mixes_tokens(consumer)]
    head = _head_width(spans, width)
    if bool(mixing) != (width > 1):
        what = f"{', '.join(mixing)} mix tokens" if mixing else "its channels depend on each other within a token"
        raise NotFoundError(f"units of {consumer}", f"{what}, in units of {width} of {channels} channels: {seen}")
    if head is None or head == channels > 1:
        raise NotFoundError(
            f"units of {consumer}",
            f"channels that reach each other are {width} of {channels} together, without heads that could be cut alone (a norm "
            f"across heads, a convolution, or a single head): {seen}",
        )
    if width == channels:
        raise NotFoundError(f"units of {consumer}", f"all {channels // head} query heads share one key and value head: {seen}")
    found = tuple(_producer(name, effects[name], consumer, width, channels // width) for name in producers)
    return Units("heads" if mixing else "neurons", consumer, found, head, width // head)


def _unit_width(spans: Tensor, channels: int) -> int:
    """The smallest width of equal units such that what one channel reaches lies inside one unit."""
    first, last, _ = spans.T
    widths = (width for width in range(1, channels + 1) if channels % width == 0)
    return next(width for width in widths if bool((first // width == last // width).all()))


def _head_width(spans: Tensor, width: int) -> int | None:
    """The smallest part of a unit that one channel reaches as a whole: what a channel of a query reaches.

    A channel of a value reaches single channels, one in each head that shares it.
    """
    if width == 1:
        return 1
    parts = [
        count for first, last, count in spans.tolist() if count == last - first + 1 and not width % count and not first % count
    ]
    return min((count for count in parts if count > 1), default=None)


def _producer(name: str, effect: Effect, consumer: str, width: int, units: int) -> str | FusedProducer:
    """A producer as in a table: one whose channels lie in the order of the units, in one or several equal parts."""
    tried, spans = effect.reached(consumer)
    for parts in range(1, MOST_PARTS + 1):
        each, rest = divmod(effect.size, parts * units)
        if not rest and torch.equal(tried % (each * units) // each, spans[:, 0] // width):
            return name if parts == 1 else FusedProducer(name, parts)
    raise NotFoundError(
        f"producers of {consumer}",
        f"the {effect.size} output channels of {name} are not {units} units in equal parts, side by side or interleaved",
    )


def _effect(probe: Probe, trace: Trace, name: str, consumers: Sequence[str]) -> Effect:
    """Change one output channel of a layer in each copy, by more than most values: which inputs of linear layers change."""
    output = trace.outputs[name]
    size = output.shape[-1]
    tried = torch.arange(PROBES) % size
    if size > PROBES:
        tried = torch.randperm(size, generator=torch.Generator().manual_seed(0))[:PROBES]

    def change(_module: Any, _args: Any, output: Tensor) -> Tensor:
        copies = output.clone().reshape(PROBES, LENGTH, size)
        copies[torch.arange(PROBES), TOKEN, tried] += 3 * output.std()
        return copies.reshape(output.shape)

    points = {other: Point(probe.block.get_submodule(other), 0) for other in trace.inputs}
    with ExitStack() as stack, torch.no_grad():
        for other in consumers:
            # A copy, since the block may add to it in place.
            stack.enter_context(replay_output(probe.block.get_submodule(other), trace.outputs[other].clone()))
        handle = probe.block.get_submodule(name).register_forward_hook(change)
        stack.callback(handle.remove)
        try:
            with capture_activations(points) as inputs:
                run_block(probe.block, probe.hidden, probe.call)
        except ModelError as error:
            raise NotFoundError("producers", str(error)) from error
    return Effect(size, tried, {other: _differs(value, trace.inputs[other]) for other, value in inputs.items()})


def _differs(value: Tensor, before: Tensor) -> Tensor:
    """Which values of two tensors differ by more than rounding, bool [copies, tokens, channels]."""
    return ((value - before).abs() > ROUNDING * before.abs().max()).reshape(PROBES, LENGTH, -1)
