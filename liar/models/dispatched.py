"""Models that accelerate has dispatched: where their weights are kept, and their blocks without its hooks, one at a time.

Accelerate gives modules a forward of their own that brings in the weights and takes them away afterwards (Hugging Face,
"Big model inference"). Between passes such weights are on the meta device, and the module's hook holds a map to where they
are: host memory, or files. Its hooks are known by their attributes here, so that accelerate need not be installed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from liar.errors import ModelError

# What accelerate sets on the modules it dispatches.
ADDED = ("_hf_hook", "_old_forward", "forward")


def is_dispatched(module: nn.Module) -> bool:
    """Whether accelerate has hooks on a module or inside of it."""
    return any("_hf_hook" in vars(each) for each in module.modules())


def is_offloaded(module: nn.Module) -> bool:
    """Whether the weights of a module, or of some inside of it, come from elsewhere for every pass."""
    return any(_offloading(each) is not None for each in module.modules())


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
    devices = (hook.execution_device for module in model.modules() for hook in _hooks(module) if _moves(hook))
    device = next((device for device in devices if device is not None), None)
    return next(model.parameters()).device if device is None else torch.device(device)


def own_forward(module: nn.Module) -> Any:
    """The forward that is set on a module itself, not counting accelerate's that moves weights; None if there is none."""
    forward = vars(module).get("forward")
    # Whatever was put over accelerate's is another's.
    if isinstance(forward, partial) and forward.args[:1] == (module,) and all(map(_moves, _hooks(module))):
        return vars(module).get("_old_forward")
    return forward


def check_hooks(model: nn.Module) -> None:
    """Check that the weights of a dispatched model come and go with their own modules.

    Raises:
        ModelError: some come with a module around theirs.
    """
    for name, module in model.named_modules():
        hook = _offloading(module)
        if hook is not None and hook.place_submodules:
            raise ModelError(
                f"{name or 'the model'} was dispatched with preload_module_classes, so weights inside of it come and go with "
                "the whole: dispatch the model without that argument"
            )


def check_weights(model: nn.Module) -> None:
    """Check that a model's weights are there, or that hooks know where each is.

    Raises:
        ModelError: some are on the meta device and nowhere else, or files are gone or were cut off.
    """
    files: set[str] = set()
    for name, module in model.named_modules():
        hook = _offloading(module)
        lost = [key for key, parameter in module.named_parameters(recurse=False) if parameter.is_meta]
        if lost and (hook is None or hook.weights_map is None):
            raise ModelError(
                f"the model is on the meta device: {'.'.join(filter(None, (name, lost[0])))} has no values; load it with real "
                "weights, or let accelerate keep them elsewhere (device_map, accelerate.cpu_offload, disk_offload)"
            )
        for key in lost:
            with _reading(module, key):
                _check_file(hook.weights_map, key, files)


def stored_tensor(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer of a module from where it is kept, in its type: memory-mapped if that is a file on a CPU's side.

    Raises:
        ModelError: it cannot be read, or has another shape.
    """
    tensor: Tensor = getattr(module, name)
    hook = _offloading(module)
    if not tensor.is_meta or hook is None:
        return tensor.detach()
    with _reading(module, name):
        value = _memory_mapped(hook.weights_map, name)
        value = hook.weights_map[name] if value is None else value
    if value.shape != tensor.shape:
        raise ModelError(
            f"{name} of a {type(module).__name__}: expected {list(tensor.shape)} where it is kept, got {list(value.shape)}: "
            "the files of an offloaded model have to stay as they were; load it again"
        )
    return value.detach().to(tensor.dtype)


@contextmanager
def stored_state(model: nn.Module) -> Iterator[None]:
    """Let the state dict of a dispatched model have all values, from where they are kept, and tied ones once.

    Raises:
        ModelError: (when the state dict is made) a weight cannot be read.
    """

    def fill(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        names = [name.removeprefix(prefix) for name, value in state.items() if isinstance(value, Tensor) and value.is_meta]
        tied: Mapping[str, str] = vars(model).get("all_tied_weights_keys", {})
        away: dict[str, str] = {name: tied.get(name, name) for name in names}
        for name, source in sorted(away.items(), key=lambda pair: pair[0] != pair[1]):
            owner, _, key = name.rpartition(".")
            is_copy = source != name and source in away
            state[prefix + name] = state[prefix + source] if is_copy else stored_tensor(model.get_submodule(owner), key)

    if not is_offloaded(model):
        yield
        return
    # Public from torch 2.5 on, under another name.
    handle: Any = model._register_state_dict_hook(fill)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        handle.remove()


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
    for module, original in zip(plain.modules(), block.modules(), strict=True):
        for name, tensor in _tensors(module):
            if tensor.device != (device := _kept_on(original, name, tensor)):
                _set(module, name, tensor.detach().to(device))


def set_parameters(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Give a module new parameters. Where accelerate brings its weights, they go to the hook, and stay on the host.

    The module's hook is replaced by another, with a map of its own: what hooks share is left as it was, and so is the old hook,
    which can be put back.
    """
    old = _offloading(module)
    if old is None:
        for name, parameter in parameters.items():
            device = _kept_on(module, name, parameter)
            setattr(module, name, parameter if parameter.device == device else _like(parameter.detach().to(device), parameter))
        return
    hook = copy.copy(old)
    others = [name for name, _ in _tensors(module) if name not in parameters]
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
        hook = _offloading(module)
        if hook is not None and _in_memory(hook.weights_map):
            set_parameters(module, {})


def take_weights_away(model: nn.Module) -> None:
    """Put back on the meta device what a pass that stopped on its way left on the device that computes."""
    for module in model.modules():
        hook = _offloading(module)
        if hook is not None and any(
            not parameter.is_meta for parameter in module._parameters.values() if parameter is not None
        ):
            hook.post_forward(module, None)


def shared_by_copies(module: nn.Module) -> list[Any]:
    """What a copy of a module has in common with it: parameters, buffers, and the hooks of accelerate."""
    hooks = [vars(each)["_hf_hook"] for each in module.modules() if "_hf_hook" in vars(each)]
    return [*module.parameters(), *module.buffers(), *hooks]


def compute_on(model: nn.Module, device: torch.device) -> None:
    """Let a dispatched model compute on another device; its weights stay where they are kept."""
    for module in model.modules():
        for hook in filter(_moves, _hooks(module)):
            hook.execution_device = device if hook.execution_device is not None else None
        for name, tensor in _tensors(module):
            if not tensor.is_meta:
                _set(module, name, tensor.detach().to(device))


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    """The hooks of accelerate on a module, those in a sequence one by one."""
    hook = vars(module).get("_hf_hook")
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def _moves(hook: Any) -> bool:
    """Whether a hook does nothing but to bring weights and inputs to a device."""
    return all(hasattr(hook, name) for name in ("execution_device", "offload", "weights_map", "place_submodules"))


def _offloading(module: nn.Module) -> Any:
    """The hook that brings a module's weights for every pass; None if they stay where they are."""
    return next((hook for hook in _hooks(module) if _moves(hook) and hook.offload), None)


def _kept_on(module: nn.Module, name: str, value: Tensor) -> torch.device:
    """Where a module keeps a tensor of some name, which may be new there, between passes."""
    own = dict(_tensors(module))
    if own and _offloading(module) is not None and own.get(name, next(iter(own.values()))).is_meta:
        return torch.device("cpu")
    like = own.get(name, next((tensor for tensor in own.values() if not tensor.is_meta), value))
    return like.device


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and buffers."""
    yield from list(module.named_parameters(recurse=False))
    yield from list(module.named_buffers(recurse=False))


def _on(device: torch.device, block: nn.Module) -> nn.Module:
    """A copy of a block without hooks of accelerate, with its tensors on a device."""
    configs = [module.config for module in block.modules() if hasattr(module, "config")]
    added = [vars(module)[name] for module in block.modules() for name in ADDED if name in vars(module)]
    copied = copy.deepcopy(block, {id(shared): shared for shared in (*shared_by_copies(block), *configs, *added)})
    for module, original in zip(copied.modules(), block.modules(), strict=True):
        for name in ADDED:
            vars(module).pop(name, None)
        for name, tensor in _tensors(original):
            _set(module, name, stored_tensor(original, name).to(device), like=tensor)
    return copied


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


def _source(weights_map: Any, name: str) -> tuple[Any, str]:
    """The map that accelerate's views with a prefix look into, and the name that a weight has there."""
    while hasattr(weights_map, "dataset") and hasattr(weights_map, "prefix"):
        weights_map, name = weights_map.dataset, f"{weights_map.prefix}{name}"
    return weights_map, name


def _in_memory(weights_map: Any) -> bool:
    """Whether a map, shared by several hooks, holds tensors."""
    source, _ = _source(weights_map, "")
    return source is not weights_map and (isinstance(source, dict) or bool(getattr(source, "state_dict", None)))


@contextmanager
def _reading(module: nn.Module, name: str) -> Iterator[None]:
    """Say what could not be read: files, safetensors and other people's maps raise whatever they raise."""
    try:
        yield
    except Exception as error:
        raise ModelError(
            f"cannot read {name} of a {type(module).__name__}, which is kept outside of the model's device "
            f"({type(error).__name__}: {error}): the files of an offloaded model have to stay where they were; load it again"
        ) from error


def _check_file(weights_map: Any, name: str, checked: set[str]) -> None:
    """Open the file that a weight is in, unless it was checked before, and read nothing of it but what is in it."""
    source, key = _source(weights_map, name)
    file = getattr(source, "index", {}).get(key, {}).get("safetensors_file")
    if file is None:
        _memory_mapped(weights_map, name)
    elif file not in checked:
        with safe_open(file, framework="pt"):
            checked.add(file)


def _memory_mapped(weights_map: Any, name: str) -> Tensor | None:
    """A weight in one of the files that accelerate writes, mapped and not read; None where it is kept in another way."""
    source, key = _source(weights_map, name)
    folder, entry = getattr(source, "save_folder", None), getattr(source, "index", {}).get(key)
    if folder is None or entry is None or key in source.state_dict or 0 in entry.get("shape", (0,)):
        return None
    file, dtype, shape = Path(folder) / f"{key}.dat", getattr(torch, entry["dtype"]), torch.Size(entry["shape"])
    if file.stat().st_size != shape.numel() * dtype.itemsize:
        raise OSError(f"{file}: expected {shape.numel() * dtype.itemsize} bytes, got {file.stat().st_size}")
    return torch.from_file(str(file), shared=False, size=shape.numel(), dtype=dtype).view(shape)
