"""What an attention with fewer heads does with an argument that comes with entries for all of them (see `HeadArgument`)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from liar.models import HeadArgument

# A buffer of the cut module, so that it is saved with the weights and moves with them: int64 [kept heads], which heads of the
# model as it was they are.
KEPT = "kept_heads"


def select_heads(module: nn.Module, argument: HeadArgument, head_mask: Tensor) -> None:
    """Let a module read the entries of the kept heads only, of an argument that has entries for all.

    Args:
        module: whose forward takes the argument; it may have been cut before.
        argument: which one.
        head_mask: bool [heads of the module now]: True for the heads that stay.
    """
    if bool(head_mask.all()) and KEPT not in module._buffers:
        return
    device = next(module.parameters()).device
    kept = module._buffers.get(KEPT)
    if kept is None:
        kept = torch.arange(len(head_mask), device=device)
        module.register_forward_pre_hook(partial(_select, argument=argument), with_kwargs=True)
    module.register_buffer(KEPT, kept.index_select(0, head_mask.nonzero().squeeze(1).to(device)))


def adopt_selection(module: nn.Module, cut_module: nn.Module) -> None:
    """Let a module read the entries that its cut copy reads."""
    kept = cut_module._buffers.get(KEPT)
    if kept is None:
        return
    if KEPT not in module._buffers:
        hook = next(hook for hook in cut_module._forward_pre_hooks.values() if getattr(hook, "func", None) is _select)
        module.register_forward_pre_hook(hook, with_kwargs=True)
    module.register_buffer(KEPT, kept)


def _select(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, argument: HeadArgument
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with the entries of the kept heads."""
    place = argument.position

    def chosen(value: Tensor | None) -> Tensor | None:
        if value is None:
            return None
        dim, kept = argument.dim, module.get_buffer(KEPT)
        if not argument.with_sequences:
            return value.index_select(dim, kept)
        by_head = value.reshape(*value.shape[:dim], args[0].shape[0], -1, *value.shape[dim + 1 :])
        return by_head.index_select(dim + 1, kept).flatten(dim, dim + 1)

    if argument.name in kwargs:
        return args, {**kwargs, argument.name: chosen(kwargs[argument.name])}
    return (*args[:place], *map(chosen, args[place : place + 1]), *args[place + 1 :]), kwargs
