"""What an attention with fewer heads does with an argument that comes with entries for all of them (see `HeadArgument`)."""

from __future__ import annotations

from dataclasses import asdict

from torch import Tensor, nn

from liar.models import HeadArgument
from liar.surgery.modeling_pruned import KEPT, HeadSelection


def selection_of(argument: HeadArgument) -> HeadSelection:
    """The hooks for an argument."""
    entries = asdict(argument)
    del entries["module"]
    return HeadSelection(**entries)


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
    kept, places = module._buffers.get(KEPT), head_mask.nonzero().squeeze(1).to(device)
    if kept is None:
        selection_of(argument).attach(module, places)
    else:
        module.register_buffer(KEPT, kept.index_select(0, places))


def adopt_selection(module: nn.Module, cut_module: nn.Module) -> None:
    """Let a module read the entries that its cut copy reads."""
    kept = cut_module._buffers.get(KEPT)
    if kept is None:
        return
    if KEPT in module._buffers:
        module.register_buffer(KEPT, kept)
        return
    hooks = (getattr(hook, "__self__", None) for hook in cut_module._forward_pre_hooks.values())
    selection = next(owner for owner in hooks if isinstance(owner, HeadSelection))
    selection.attach(module, kept)
