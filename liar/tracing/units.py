"""The units that a consumer reads, and the layers that produce them: found by changing single channels.

In one run of a block on copies of one sequence, another output channel of a layer is changed in every copy. The channels of the
consumer's input that change with it belong to the same unit: one channel for a neuron. In attention, a channel of a query
reaches all channels of its head, through the softmax; a channel of a key, those of all heads that share it.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from liar.tracing.small import LENGTH, PROBES, Probe, linear_layers
from liar.tracing.trace import Trace

# Changes smaller than this, relative to the largest value, are rounding.
ROUNDING = 1e-5
MOST_PARTS = 4


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
class _Reach:
    """What the output channels of a layer reach.

    Attributes:
        size: output channels of the layer.
        tried: the channels that were changed, [probes].
        reached: which channels of the consumer's input changed, bool [probes, channels].
        feeds: other linear layers whose input changed.
    """

    size: int
    tried: Tensor
    reached: Tensor
    feeds: frozenset[str]

    def spans(self) -> Tensor:
        """First and last channel that was reached, and their number, [probes that reach any, 3]."""
        rows = self.reached[self.reached.any(1)].long()
        first, last = rows.argmax(1), rows.shape[1] - 1 - rows.flip(1).argmax(1)
        return torch.stack([first, last, rows.sum(1)], 1)


def find_units(probe: Probe, trace: Trace, consumer: str, consumers: Sequence[str]) -> Units:
    """The units that a consumer reads; the outputs of the other consumers are held fixed.

    Raises:
        NotFoundError: it has no producers, or their channels are not in units; says what was seen.
    """
    reaches = {name: _reach(probe, trace, name, consumer, consumers) for name in linear_layers(probe.block) if name != consumer}
    reaches = {name: reach for name, reach in reaches.items() if reach.reached.any()}
    if not reaches:
        raise NotFoundError(f"producers of {consumer}", "no linear layer of the block changes its input")
    inner = {name: next(iter(reach.feeds & reaches.keys()), None) for name, reach in reaches.items()}
    producers = {name: reach for name, reach in reaches.items() if inner[name] is None}
    through = "".join(f"; {name} reaches it through {other} as well" for name, other in inner.items() if other)
    spans = torch.cat([reach.spans() for reach in producers.values()])
    channels, width = trace.inputs[consumer].shape[-1], _unit_width(spans, trace.inputs[consumer].shape[-1])
    mixing = [name for name in producers if _mixes_tokens(probe, trace, name, consumer, consumers)]
    whole = spans[(spans[:, 2] > 1) & (spans[:, 2] == spans[:, 1] - spans[:, 0] + 1), 2]
    head = int(whole.min()) if len(whole) else 1
    seen = f"the layers that it reads are {', '.join(producers)}{through}"
    if bool(mixing) != (width > 1):
        what = f"{', '.join(mixing)} mix tokens" if mixing else "its channels depend on each other within a token"
        raise NotFoundError(f"units of {consumer}", f"{what}, in units of {width} of {channels} channels: {seen}")
    if width > 1 and (head == channels or width % head):
        raise NotFoundError(
            f"units of {consumer}",
            f"one channel of a query reaches {head} of {channels} channels, one of a key {width}, so there are no heads that "
            f"could be cut alone (a norm across heads, a convolution, or a single head): {seen}",
        )
    if width == channels:
        raise NotFoundError(f"units of {consumer}", f"all {channels // head} query heads share one key and value head: {seen}")
    found = tuple(_producer(name, reach, consumer, width, channels // width) for name, reach in producers.items())
    return Units("heads" if mixing else "neurons", consumer, found, head, width // head)


def _unit_width(spans: Tensor, channels: int) -> int:
    """The smallest width of equal units such that what one channel reaches lies inside one unit."""
    first, last, _ = spans.T
    widths = (width for width in range(1, channels + 1) if channels % width == 0)
    return next(width for width in widths if bool((first // width == last // width).all()))


def _producer(name: str, reach: _Reach, consumer: str, width: int, units: int) -> str | FusedProducer:
    """A producer as in a table: one whose channels lie in the order of the units, in one or several equal parts."""
    tried, actual = reach.tried[reach.reached.any(1)], reach.spans()[:, 0] // width
    for parts in range(1, MOST_PARTS + 1):
        each, rest = divmod(reach.size, parts * units)
        if not rest and torch.equal(tried % (each * units) // each, actual):
            return name if parts == 1 else FusedProducer(name, parts)
    raise NotFoundError(
        f"producers of {consumer}",
        f"the {reach.size} output channels of {name} are not {units} units in equal parts, side by side or interleaved",
    )


def _reach(probe: Probe, trace: Trace, name: str, consumer: str, consumers: Sequence[str]) -> _Reach:
    size = trace.outputs[name].shape[-1] if name in trace.outputs else 0
    if not size:
        return _Reach(0, torch.zeros(0), torch.zeros(0, 1, dtype=torch.bool), frozenset())
    tried = torch.arange(size).repeat(-(-PROBES // size))[:PROBES]
    if size > PROBES:
        # The first and the last channels, and others at random.
        tried = torch.randperm(size, generator=torch.Generator().manual_seed(0))[:PROBES]
        tried[:2] = torch.tensor([0, size - 1])
    changed = _changed(probe, trace, name, tried, consumers)
    feeds = frozenset(other for other, value in changed.items() if other not in (consumer, name) and bool(value.any()))
    return _Reach(size, tried, changed[consumer].any(1), feeds)


def _mixes_tokens(probe: Probe, trace: Trace, name: str, consumer: str, consumers: Sequence[str]) -> bool:
    """Whether what a layer gives for the first token reaches the consumer's input for others."""
    tried = torch.arange(PROBES) % trace.outputs[name].shape[-1]
    changed = _changed(probe, trace, name, tried, consumers, first_only=True)
    return bool(changed[consumer][:, 1:].any())


def _changed(
    probe: Probe, trace: Trace, name: str, tried: Tensor, consumers: Sequence[str], *, first_only: bool = False
) -> dict[str, Tensor]:
    """Change one output channel of a layer in each copy: which inputs of linear layers change, bool [copies, tokens, *]."""
    noise = torch.randn(LENGTH, generator=torch.Generator().manual_seed(0)) * 3 * float(trace.outputs[name].std())
    if first_only:
        noise[1:] = 0

    def change(_module: Any, _args: Any, output: Tensor) -> Tensor:
        copies = output.clone().reshape(PROBES, LENGTH, -1)
        copies[torch.arange(PROBES), :, tried] += noise
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
            raise NotFoundError("consumer", str(error)) from error
    return {
        other: ((value - trace.inputs[other]).abs() > ROUNDING * trace.inputs[other].abs().max()).reshape(PROBES, LENGTH, -1)
        for other, value in inputs.items()
    }
