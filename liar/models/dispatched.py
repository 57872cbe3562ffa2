"""Models that accelerate has dispatched: its hooks, and what they say of where a model computes.

Accelerate gives modules a forward of their own that brings in the weights and takes them away afterwards (Hugging Face,
"Big model inference"). Between passes such weights are on the meta device, and the module's hook holds a map to where they
are: host memory, or files. Its hooks are known by their attributes here, so that accelerate need not be installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from liar.errors import ModelError


def is_dispatched(module: nn.Module) -> bool:
    """Whether accelerate has hooks on a module or inside of it."""
    return any("_hf_hook" in vars(each) for each in module.modules())


def is_offloaded(module: nn.Module) -> bool:
    """Whether the weights of a module, or of some inside of it, come from elsewhere for every pass."""
    return any(offloading_hook(each) is not None for each in module.modules())


def check_kept_here(model: nn.Module, what: str, remedy: str) -> None:
    """Check that a model's weights stay where it computes, as some work needs.

    Raises:
        ModelError: they come and go.
    """
    if is_offloaded(model):
        raise ModelError(
            f"{type(model).__name__}: {what} need all weights on one device at once, and accelerate keeps some elsewhere "
            f"(device_map, cpu_offload, disk_offload): {remedy}"
        )


def compute_device(model: nn.Module) -> torch.device:
    """The device on which a model computes: of a dispatched one that of its first hook, else where its first parameter is."""
    devices = (hook.execution_device for module in model.modules() for hook in hooks_of(module) if moves_weights(hook))
    device = next((device for device in devices if device is not None), None)
    if device is not None:
        return torch.device(device)
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def own_forward(module: nn.Module) -> Any:
    """The forward that is set on a module itself, not counting accelerate's that moves weights; None if there is none."""
    forward = vars(module).get("forward")
    # Whatever was put over accelerate's is another's.
    if isinstance(forward, partial) and forward.args[:1] == (module,) and all(map(moves_weights, hooks_of(module))):
        return vars(module).get("_old_forward")
    return forward


def check_hooks(model: nn.Module) -> None:
    """Check that the weights of a dispatched model come and go with their own modules.

    Raises:
        ModelError: some come with a module around theirs.
    """
    for name, module in model.named_modules():
        hook = offloading_hook(module)
        if hook is not None and hook.place_submodules:
            raise ModelError(
                f"{name or 'the model'} was dispatched with preload_module_classes, so weights inside of it come and go with "
                "the whole: dispatch the model without that argument"
            )


def take_weights_away(model: nn.Module) -> None:
    """Put back on the meta device what a pass that stopped on its way left on the device that computes."""
    for module in model.modules():
        hook = offloading_hook(module)
        if hook is not None and any(
            not parameter.is_meta for parameter in module._parameters.values() if parameter is not None
        ):
            hook.post_forward(module, None)


def hooks_of(module: nn.Module) -> tuple[Any, ...]:
    """The hooks of accelerate on a module, those in a sequence one by one."""
    hook = vars(module).get("_hf_hook")
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def moves_weights(hook: Any) -> bool:
    """Whether a hook does nothing but to bring weights and inputs to a device."""
    return all(hasattr(hook, name) for name in ("execution_device", "offload", "weights_map", "place_submodules"))


def offloading_hook(module: nn.Module) -> Any:
    """The hook that brings a module's weights for every pass; None if they stay where they are."""
    return next((hook for hook in hooks_of(module) if moves_weights(hook) and hook.offload), None)


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and buffers."""
    yield from list(module.named_parameters(recurse=False))
    yield from list(module.named_buffers(recurse=False))
