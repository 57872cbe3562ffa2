"""Blocks of a dispatched model without accelerate's hooks, one at a time, and what becomes of them when they are finished."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from liar.models.dispatched import compute_device, hooks_of, is_dispatched, moves_weights, offloading_hook, own_tensors
from liar.models.stored import is_in_memory, stored_tensor

# What accelerate sets on the modules it dispatches.
ADDED = ("_hf_hook", "_old_forward", "forward")


def plain_block(block: nn.Module, device: torch.device | None = None) -> nn.Module:
    """A block with its weights on the device that computes, and without hooks of accelerate.

    That is the block itself where it has none. Else a copy, for as long as it is needed: modules of its own, with parameters
    and buffers that are read from where they are kept. Of files on the CPU they are memory-mapped.

    Args:
        block: of a model; it is not changed.
        device: for the copy; that of the block's own hooks if not given.

    Raises:
        ModelError: a weight cannot be read.

    Example:
        >>> from liar.models import plain_block
        >>> block = model.get_submodule(liar.discover(model).blocks[0])
        >>> plain_block(block) is block
        True
    """
    if not is_dispatched(block):
        return block
    return _on(compute_device(block) if device is None else device, block)


def on_device(block: nn.Module, device: torch.device) -> nn.Module:
    """A block that was finished, with its tensors on a device: itself if they are, else a copy."""
    tensors = (*block.parameters(), *block.buffers())
    return block if all(tensor.device == device for tensor in tensors) else _on(device, block)


def put_away(plain: nn.Module, block: nn.Module) -> None:
    """Move the tensors of a finished copy of a block from the device that computes to where those of the block are kept."""
    originals = dict(block.named_modules())
    for path, module in plain.named_modules():
        # What a step has added is refused later, when the blocks are adopted.
        for name, tensor in own_tensors(module) if path in originals else ():
            if tensor.device != (device := _kept_on(originals[path], name, tensor)):
                _set(module, name, tensor.detach().to(device))


def set_parameters(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Give a module new parameters. Where accelerate brings its weights, they go to the hook, and stay on the host.

    The module's hook is replaced by another, with a map of its own: what hooks share is left as it was, and so is the old hook,
    which can be put back.
    """
    old = offloading_hook(module)
    if old is None:
        for name, parameter in parameters.items():
            device = _kept_on(module, name, parameter)
            setattr(module, name, parameter if parameter.device == device else _like(parameter.detach().to(device), parameter))
        return
    hook = copy.copy(old)
    others = [name for name, _ in own_tensors(module) if name not in parameters]
    hook.weights_map = {name: parameter.detach().to("cpu") for name, parameter in parameters.items()}
    hook.weights_map |= {name: stored_tensor(module, name) for name in others if getattr(module, name).is_meta}
    # Where accelerate puts them when it takes its hooks away: what is new goes where the others go.
    devices = next(iter(old.original_devices.values()), torch.device("cpu"))
    hook.original_devices = {**dict.fromkeys(parameters, devices), **old.original_devices}
    hook.tied_params_names = set(old.tied_params_names) - parameters.keys()
    hook.tied_params_map = old.tied_params_map if hook.tied_params_names else None
    for name, parameter in parameters.items():
        module._parameters[name] = _like(torch.empty_like(parameter, device="meta"), parameter)
    whole = vars(module)["_hf_hook"]
    if whole is not old:
        several = copy.copy(whole)
        several.hooks = tuple(hook if each is old else each for each in whole.hooks)
        hook = several
    module._hf_hook = hook


def forget_unused(model: nn.Module) -> None:
    """Let go of weights in host memory that the hooks of a model share and that no module has any more."""
    for module in model.modules():
        hook = offloading_hook(module)
        if hook is not None and is_in_memory(hook.weights_map):
            set_parameters(module, {})


def shared_by_copies(module: nn.Module) -> list[Any]:
    """What a copy of a module has in common with it: parameters, buffers, and the hooks of accelerate."""
    hooks = [vars(each)["_hf_hook"] for each in module.modules() if "_hf_hook" in vars(each)]
    return [*module.parameters(), *module.buffers(), *hooks]


def copy_without_hooks(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy of a module without the hooks of accelerate, and without the weights that they keep.

    Args:
        module: dispatched or not; it is not changed.
        memo: as `copy.deepcopy` takes it: what stands in the copy for an object, by its `id`.
    """
    if not is_dispatched(module):
        return copy.deepcopy(module, memo)
    added = [vars(each)[name] for each in module.modules() for name in ADDED if name in vars(each)]
    copied = copy.deepcopy(module, {**memo, **{id(each): each for each in added}})
    for each in copied.modules():
        for name in ADDED:
            vars(each).pop(name, None)
    return copied


def compute_on(model: nn.Module, device: torch.device) -> None:
    """Let a dispatched model compute on another device; its weights stay where they are kept."""
    for module in model.modules():
        for hook in filter(moves_weights, hooks_of(module)):
            hook.execution_device = device if hook.execution_device is not None else None
        for name, tensor in own_tensors(module):
            if not tensor.is_meta:
                _set(module, name, tensor.detach().to(device))


def _on(device: torch.device, block: nn.Module) -> nn.Module:
    """A copy of a block without hooks of accelerate, with its tensors on a device."""
    configs = [module.config for module in block.modules() if hasattr(module, "config")]
    copied = copy_without_hooks(block, {id(shared): shared for shared in (*shared_by_copies(block), *configs)})
    for module, original in zip(copied.modules(), block.modules(), strict=True):
        for name, tensor in own_tensors(original):
            _set(module, name, stored_tensor(original, name).to(device), like=tensor)
    return copied


def _kept_on(module: nn.Module, name: str, value: Tensor) -> torch.device:
    """Where a module keeps a tensor of some name, which may be new there, between passes."""
    own = dict(own_tensors(module))
    if own and offloading_hook(module) is not None and own.get(name, next(iter(own.values()))).is_meta:
        return torch.device("cpu")
    like = own.get(name, next((tensor for tensor in own.values() if not tensor.is_meta), value))
    return like.device


def _set(module: nn.Module, name: str, value: Tensor, like: Tensor | None = None) -> None:
    """Replace a parameter by one with other values, or a buffer."""
    if name in module._parameters:
        like = module._parameters[name] if like is None else like
        assert like is not None
        module._parameters[name] = _like(value, like)
    else:
        module._buffers[name] = value


def _like(value: Tensor, parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=parameter.requires_grad)
