"""Masks of single weights: by the name of a parameter, which of its entries stay. They hold while something else is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from liar.errors import MaskError

# Name of a parameter -> bool, of its shape: True where an entry stays.
WeightMasks = Mapping[str, Tensor]


def apply_masks(module: nn.Module, masks: WeightMasks, *, prefix: str = "") -> None:
    """Set the weights that are removed to zero, in place.

    Args:
        module: a model, or with `prefix` a part of it, or a copy of that part.
        masks: of the model's weights; those of other parts are passed over.
        prefix: what the names of the part's parameters begin with in the model: `"model.layers.3."`.

    Raises:
        MaskError: there is no such parameter, or it has another shape.

    Example:
        >>> masks = {"encoder.layer.0.output.dense.weight": torch.zeros(32, 64, dtype=torch.bool)}
        >>> apply_masks(model, masks)
        >>> int(model.get_parameter("encoder.layer.0.output.dense.weight").count_nonzero())
        0
    """
    with torch.no_grad():
        for weight, mask in list(_masked(module, masks, prefix)):
            weight.masked_fill_(~mask.to(weight.device), 0)


@contextmanager
def hold_masks(module: nn.Module, masks: WeightMasks, *, prefix: str = "") -> Iterator[None]:
    """Keep removed weights at zero while the rest is trained; arguments and errors are those of `apply_masks`.

    Their gradients are zero, so that no optimizer that treats weights one by one moves them, with weight decay or without.

    Example:
        >>> name = "encoder.layer.0.output.dense.weight"
        >>> weight, half = model.get_parameter(name), torch.arange(64).expand(32, 64) % 2 == 0
        >>> with hold_masks(model, {name: half}):
        ...     weight.square().sum().backward()
        >>> bool((weight.grad[~half] == 0).all() and (weight[~half] == 0).all())
        True
    """
    apply_masks(module, masks, prefix=prefix)
    with ExitStack() as stack:
        for weight, mask in _masked(module, masks, prefix):
            if weight.requires_grad:
                handle: RemovableHandle = weight.register_hook(_zeroing(mask.to(weight.device)))  # type: ignore[no-untyped-call]
                stack.callback(handle.remove)
        yield
    apply_masks(module, masks, prefix=prefix)


def _zeroing(mask: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient.masked_fill(~mask, 0)


def _masked(module: nn.Module, masks: WeightMasks, prefix: str) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """The parameters that have a mask, each with it."""
    parameters = dict(module.named_parameters())
    for name, mask in masks.items():
        if not name.startswith(prefix):
            continue
        weight = parameters.get(name.removeprefix(prefix))
        if weight is None:
            raise MaskError(f"mask of {name}: the {type(module).__name__} has no parameter of this name; use its own masks")
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != weight.shape:
            given = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
            raise MaskError(f"mask of {name}: expected torch.bool {list(weight.shape)}, as the parameter, got {given}")
        yield weight, mask
