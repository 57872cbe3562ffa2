"""Reading the weights of a dispatched model from where they are kept: host memory, or files, which are mapped."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from liar.errors import ModelError
from liar.models.dispatched import is_offloaded, offloading_hook

# What accelerate warns of when a state dict is made.
SAVING = "Attempting to save a model with offloaded modules"


def check_weights(model: nn.Module) -> None:
    """Check that a model's weights are there, or that hooks know where each is.

    Raises:
        ModelError: some are on the meta device and nowhere else, or files are gone or were cut off.
    """
    files: set[str] = set()
    for name, module in model.named_modules():
        hook = offloading_hook(module)
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
    hook = offloading_hook(module)
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
        sources = _sources(model, {name.removeprefix(prefix): value for name, value in state.items()})
        for name, source in sorted(sources.items(), key=lambda pair: pair[0] != pair[1]):
            state[prefix + name] = _stored_by_name(model, name) if source == name else state[prefix + source]

    if not is_offloaded(model):
        yield
        return
    # Public from torch 2.5 on, under another name.
    handle: Any = model._register_state_dict_hook(fill)  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            # It is for those who would load the weights; here they are mapped, or where they are kept anyway.
            warnings.filterwarnings("ignore", SAVING)
            yield
    finally:
        handle.remove()


def stored_items(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The state dict, one value after the other: of a dispatched model no more than one is in memory at a time.

    Raises:
        ModelError: a weight cannot be read.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", SAVING)
        state = model.state_dict()
    sources = _sources(model, state)
    for name, value in state.items():
        yield name, _stored_by_name(model, sources[name]) if name in sources else value


def _sources(model: nn.Module, state: Mapping[str, Any]) -> dict[str, str]:
    """Of every value of a state dict that is kept elsewhere, the name under which it is: of a tied one that of the first."""
    tied: Mapping[str, str] = vars(model).get("all_tied_weights_keys", {})
    away = [name for name, value in state.items() if isinstance(value, Tensor) and value.is_meta]
    return {name: source if (source := tied.get(name, name)) in away else name for name in away}


def _stored_by_name(model: nn.Module, name: str) -> Tensor:
    owner, _, key = name.rpartition(".")
    return stored_tensor(model.get_submodule(owner), key)


def _source(weights_map: Any, name: str) -> tuple[Any, str]:
    """The map that accelerate's views with a prefix look into, and the name that a weight has there."""
    while hasattr(weights_map, "dataset") and hasattr(weights_map, "prefix"):
        weights_map, name = weights_map.dataset, f"{weights_map.prefix}{name}"
    return weights_map, name


def is_in_memory(weights_map: Any) -> bool:
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
