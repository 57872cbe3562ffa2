"""A model without memory: its passes run on fake tensors, so that what they hold and compute can be counted on any machine.

Fake tensors (`torch._subclasses.fake_tensor`, what `torch.export` traces with) know shapes and types alone, but choose the same
kernels as those of a CPU: fused attention never writes its scores. A mode below them sees every operation. No formula by family
is needed, and a model of 70 billion parameters passes in seconds.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers import masking_utils

from liar.errors import ModelError
from liar.models import copy_without_hooks

# Fused attention on a CPU, which torch's own table leaves out.
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# One thread at a time changes transformers and puts it back: two in turns would put back what the other has set.
PATCHED = threading.RLock()


class Tally(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what runs inside: products, other traffic, and bytes that are held.

    Tensors that were there before do not count; what is made inside counts until nobody holds it any more.

    Attributes:
        flops: of products of matrices.
        traffic: bytes that all other operations read and write.
        held: bytes of the tensors that were made inside and are still there.
        peak: the most there were.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops, self.traffic, self.held, self.peak = 0.0, 0.0, 0, 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count it."""
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        for value in given:
            self._known.setdefault(value.untyped_storage()._cdata, 0)  # a tensor from outside
        result = operation(*args, **(kwargs or {}))
        made = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        fresh = [value for value in made if self._note(value)]
        flops = _flops(operation, args, kwargs or {}, result)
        self.flops += flops
        if not flops and fresh:
            self.traffic += sum(value.nbytes for value in (*given, *fresh))
        return result

    def _note(self, value: Tensor) -> bool:
        """Count a tensor until its memory is given back; whether that is new."""
        if value.is_meta:  # it has none; those of an imitation say that they are elsewhere
            return False
        storage = value.untyped_storage()
        place = storage._cdata
        if place in self._known:
            return False
        size = self._known[place] = storage.nbytes()
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._forget, place)
        return True

    def _forget(self, place: int) -> None:
        self.held -= self._known.pop(place, 0)


def _flops(operation: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> float:
    """Floating-point operations of a product; 0 of everything else."""
    packet = getattr(operation, "overloadpacket", None)
    if packet is ATTENTION:
        return float(sdpa_flop_count(*(value.shape for value in args[:3])))  # type: ignore[no-untyped-call]
    if packet is ATTENTION_BACKWARD:
        return float(sdpa_backward_flop_count(*(value.shape for value in args[:4])))  # type: ignore[no-untyped-call]
    count = flop_registry.get(packet)
    return 0.0 if count is None else float(count(*args, **kwargs, out_val=result))


@contextmanager
def imitation(model: nn.Module) -> Iterator[nn.Module]:
    """A copy of a model, whole, dispatched or on the meta device, that computes with fake tensors as long as the body runs.

    Raises:
        ModelError: a step of the model asks for values, which are not there.
    """
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _one_text_in_a_row():
            tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
            fake: Any = copy_without_hooks(model, {id(tensor): _fake(tensor) for _, tensor in tensors}).train(False)
            if hasattr(fake, "config"):
                fake.config.return_dict = True  # as `preserve_model_state` does it for the model itself
            yield fake
    except Exception as error:
        if not isinstance(error, RuntimeError | NotImplementedError) and not _looks_at_values(error):
            raise
        raise ModelError(
            f"{type(model).__name__} cannot be planned: one of its steps looks at values ({type(error).__name__}: "
            f"{str(error).splitlines()[0]})"
        ) from error


def _looks_at_values(error: BaseException | None) -> bool:
    """Whether an error was made from one of a tensor that has no values: where a model is run, it says that it was running."""
    while error is not None and not isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
        error = error.__cause__
    return error is not None


@contextmanager
def _one_text_in_a_row() -> Iterator[None]:
    """Let transformers find no packed texts in rows of fake positions: where it cannot look, it would write a mask for them."""
    with PATCHED:
        find = masking_utils.find_packed_sequence_indices

        def look(position_ids: Tensor) -> Tensor | None:
            return None if isinstance(position_ids, FakeTensor) else find(position_ids)

        masking_utils.find_packed_sequence_indices = look
        try:
            yield
        finally:
            masking_utils.find_packed_sequence_indices = find


def _fake(tensor: Tensor) -> Tensor:
    """A tensor of the same shape and type, of no memory; called where fake tensors are made."""
    value = torch.empty(tensor.shape, dtype=tensor.dtype)
    return nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value


def fakes(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a batch as fake tensors; called where fake tensors are made."""
    return {
        name: torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
