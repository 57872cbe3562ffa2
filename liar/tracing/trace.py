"""One run of a block with everything noted that happens to tensors of the size of the hidden states."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from liar.models.layers import storage_of
from liar.runtime import run_block
from liar.tracing.small import Probe


@dataclass(frozen=True)
class Argument:
    """A tensor that a module got: positional argument `index` of its forward."""

    module: str
    index: int
    value: Tensor


@dataclass
class Trace:
    """What happened in one run of a block.

    Attributes:
        hidden: what came in, [sequences, length, channels].
        output: what came out.
        arguments: tensors that modules got, in order.
        outputs: module -> the (first) tensor it returned.
        inputs: linear layer -> its input.
        sums: all sums of two tensors of the size of the hidden states.
        factors: tensors of that size that were multiplied by something.
    """

    hidden: Tensor
    output: Tensor
    arguments: list[Argument] = field(default_factory=list)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    sums: list[Tensor] = field(default_factory=list)
    factors: list[Tensor] = field(default_factory=list)

    def same(self, one: Tensor, other: Tensor) -> bool:
        """Whether two tensors of the size of the hidden states are the same but for rounding, flattened or not.

        One copy of the sequence is compared: the others are like it.
        """
        if one.numel() != other.numel():
            return False
        one, other = (each.flatten()[: self.hidden[0].numel()] for each in (one, other))
        return torch.allclose(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))

    def linear_outputs(self) -> dict[str, Tensor]:
        """The outputs of linear layers that are as large as the hidden states."""
        size = self.hidden.numel()
        return {name: output for name, output in self.outputs.items() if name in self.inputs and output.numel() == size}

    def readers(self, value: Tensor) -> list[Argument]:
        """Where modules get a tensor."""
        return [each for each in self.arguments if self.same(each.value, value)]


SUMS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
PRODUCTS = (torch.ops.aten.mul.Tensor, torch.ops.aten.mul.Scalar)


class _Sums(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the results of sums of two tensors of some size, and what is multiplied."""

    def __init__(self, size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.size = size
        self.results: list[Tensor] = []
        self.factors: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in SUMS and self._counts(*args[:2]):
            self.results.append(result.detach().clone())
        if func in PRODUCTS and self._counts(args[0]):
            self.factors.append(args[0].detach().clone())
        return result

    def _counts(self, *operands: Any) -> bool:
        return all(isinstance(each, Tensor) and each.numel() == self.size for each in operands)


def trace_block(probe: Probe) -> Trace:
    """Run a block and note what its modules get and return, and which sums are made."""
    block, hidden = probe.block, probe.hidden
    trace, handles, sums = Trace(hidden.clone(), hidden), [], _Sums(hidden.numel())
    for name, module in block.named_modules():
        if name:

            def before(module: Any, args: Any, name: str = name) -> None:
                # Copies, since blocks may go on to change tensors in place.
                tensors = [(index, value) for index, value in enumerate(args) if isinstance(value, Tensor)]
                wanted = [(index, value) for index, value in tensors if value.numel() == hidden.numel()]
                trace.arguments.extend(Argument(name, index, value.clone()) for index, value in wanted)
                if storage_of(module) and tensors:
                    trace.inputs[name] = tensors[0][1].clone()

            def after(_module: Any, _args: Any, output: Any, name: str = name) -> None:
                first = output[0] if isinstance(output, tuple) and output else output
                if isinstance(first, Tensor):
                    trace.outputs[name] = first.clone()

            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        with torch.no_grad(), sums:
            trace.output = run_block(block, hidden, probe.call)
    finally:
        for handle in handles:
            handle.remove()
    trace.sums, trace.factors = sums.results, sums.factors
    return trace
