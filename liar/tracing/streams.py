"""The residual stream: which layers add to it, where it can be captured, and whether it is normalised."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from liar.models import linear_layers
from liar.tracing.findings import NotFoundError
from liar.tracing.trace import Trace
from liar.tracing.units import Units


@dataclass(frozen=True)
class Streams:
    """How a block adds to the residual stream.

    Attributes:
        residuals: for each consumer, the places (module, positional argument) where the stream is that it adds to.
        is_parallel: whether both consumers add to the same stream.
        is_pre_norm: whether the block gives its last sum as it is.
    """

    residuals: dict[str, list[tuple[str, int]]]
    is_parallel: bool
    is_pre_norm: bool


def find_consumers(trace: Trace) -> list[str]:
    """The linear layers whose output is added to the residual stream, alone or with another's, in the order of the data."""
    outputs = trace.linear_outputs()
    alone = [name for name, output in outputs.items() if _places(trace, [output])]
    together = [
        name
        for name in outputs
        if any(_places(trace, [outputs[name], outputs[other]]) for other in outputs if other != name and name not in alone)
    ]
    return [name for name in outputs if name in alone or name in together]


def check_consumers(block: nn.Module, trace: Trace, consumers: Sequence[str]) -> None:
    """Check that there is one consumer for heads and one for neurons.

    Raises:
        NotFoundError: there are more or fewer, or they flatten tokens; says what happens to the outputs of other layers.
    """
    outputs = trace.linear_outputs()
    for name in consumers:
        if outputs[name].shape != trace.hidden.shape:
            raise NotFoundError(
                f"consumer {name}",
                f"it gives a tensor {list(outputs[name].shape)}, expected [sequences, length, channels]; models that flatten "
                "tokens are not supported",
            )
    if len(consumers) != 2:
        others = [_use(block, trace, name) for name in outputs if name not in consumers]
        raise NotFoundError(
            "consumers",
            "expected two linear layers, of heads and of neurons, whose output is added as it is to the residual stream, which "
            f"some module gets as positional argument; there are {len(consumers)} ({', '.join(consumers) or 'none'}); "
            f"{'; '.join([*filter(None, others), *_other_weights(block)]) or 'no other layer is as wide'}",
        )


def find_streams(trace: Trace, consumers: Sequence[str]) -> Streams:
    """Where the residual streams of two consumers are, given in the order of the data.

    Raises:
        NotFoundError: no module gets one as positional argument.
    """
    first, second = (trace.outputs[name] for name in consumers)
    sequential = [_places(trace, [first]), _places(trace, [second])]
    if not all(sequential) and (both := _places(trace, [first, second])):
        places, is_parallel = [both, both], True
    else:
        places, is_parallel = sequential, False
    for name, found in zip(consumers, places, strict=True):
        if not found:
            raise NotFoundError(
                f"residual of {name}", "no module of the block gets the stream that it is added to as positional argument"
            )
    is_pre_norm = any(trace.same(total, trace.output) for total in trace.sums)
    return Streams(dict(zip(consumers, places, strict=True)), is_parallel, is_pre_norm)


def find_sublayer(trace: Trace, units: Units) -> str | None:
    """The smallest module that holds the producers and gives the consumer's input or, if it calls it, its output."""
    consumer = units.consumer
    names = [each if isinstance(each, str) else each.module for each in units.producers]
    for name, output in trace.outputs.items():
        gives = trace.outputs[consumer] if consumer.startswith(f"{name}.") else trace.inputs[consumer]
        if all(each.startswith(f"{name}.") for each in names) and trace.same(output, gives):
            return name
    return None


def residual_of(places: Sequence[tuple[str, int]], consumer: str, sublayer: str | None) -> tuple[str, int] | None:
    """The first place that is not inside the sublayer, whose parts do not run where its output is replayed.

    A module beside the sublayer (a norm) is preferred to the sublayer itself, or one that holds it.
    """
    outside = [place for place in places if sublayer is None or not place[0].startswith(f"{sublayer}.")]
    return min(outside, key=lambda place: f"{sublayer or consumer}.".startswith(f"{place[0]}."), default=None)


def _places(trace: Trace, added: Sequence[Tensor]) -> list[tuple[str, int]]:
    """Where modules get a tensor that makes, with what is added to it, one of the sums of the block."""
    total = sum(value.reshape(trace.hidden.shape) for value in added)
    return [
        (each.module, each.index)
        for each in trace.arguments
        if not any(trace.same(each.value, output) for output in trace.linear_outputs().values())
        and any(trace.same(each.value.reshape(trace.hidden.shape) + total, result) for result in trace.sums)
    ]


def _use(block: nn.Module, trace: Trace, name: str) -> str | None:
    """What happens to the output of a layer that is not added to the stream, as far as it can be seen."""
    output = trace.outputs[name]
    readers = dict.fromkeys(each.module for each in trace.readers(output))
    uses = [f"goes to {reader} ({type(block.get_submodule(reader)).__name__})" for reader in readers]
    if not uses and any(trace.same(factor, output) for factor in trace.factors):
        uses.append("is multiplied by something")
    return f"the output of {name} {' and '.join(uses)}" if uses else None


def _other_weights(block: nn.Module) -> Iterator[str]:
    """Matrices of the block that are in no linear layer."""
    inside = {f"{name}.weight" for name in linear_layers(block)}
    others = [f"{name} {list(p.shape)}" for name, p in block.named_parameters() if p.ndim > 1 and name not in inside]
    if others:
        yield f"weights outside of linear layers: {', '.join(others)}"
