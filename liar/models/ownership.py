"""Whether the layers of a model can be rewritten: asked once, before any work is done."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from liar.errors import ModelError
from liar.models.dispatched import check_hooks, is_dispatched, own_forward
from liar.models.layout import Site

# Classes that wrap a model or a part of one -> what to do first. Known by name: their packages may not be installed.
WRAPPERS = {
    "DataParallel": "unwrap it: pass model.module",
    "DistributedDataParallel": "unwrap it: pass model.module",
    "FullyShardedDataParallel": "unwrap it: pass the model before it was sharded",
    "OptimizedModule": "unwrap what torch.compile made: pass model._orig_mod, and compile again afterwards",
    "CrossEncoder": "pass the transformer inside it: model[0].auto_model",
    "SentenceTransformer": "pass the transformer inside it: model[0].auto_model",
    "PeftModel": "merge its adapters first: model = model.merge_and_unload()",
    "BaseTuner": "merge its adapters first: model = model.merge_and_unload()",
    "BaseTunerLayer": "merge the adapters first, or unload them (PEFT's merge_and_unload)",
}


def check_model(model: Any) -> None:
    """Check that something is a model, and none inside a wrapper.

    Raises:
        ModelError: it is not; says what to pass.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a Hugging Face model, got a {type(model).__name__}; read a folder with liar.load(folder)")
    for name, module in model.named_modules():
        for kind in type(module).__mro__:
            if kind.__name__ in WRAPPERS:
                where = f"the model's {name} is" if name else "got"
                what = f"{where} a {type(module).__name__}: {WRAPPERS[kind.__name__]}"
                raise ModelError(f"expected a plain Hugging Face model, {what}")


def check_default_device() -> None:
    """Check that torch computes something by default.

    Raises:
        ModelError: its default device is the meta device.
    """
    if torch.get_default_device().type == "meta":
        raise ModelError("torch's default device is meta, where nothing is computed: call this outside of it")


def why_unusable(device: str) -> str | None:
    """Why torch cannot use a device here, in its own words; None if it can."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return None


def check_owned(model: nn.Module, sites: Iterable[Site]) -> None:
    """Check that the layers of all sites are the model's own, and that its blocks compute what their classes say.

    Raises:
        ModelError: a weight is shared, or comes and goes with a module around it; or a module has a forward of its own, bound
            to the layers as they were.
    """
    sites = list(sites)
    check_hooks(model)
    for block in dict.fromkeys(site.block for site in sites):
        for name, module in model.get_submodule(block).named_modules():
            own = own_forward(module)
            # What accelerate leaves when it takes its hooks away is the class's own forward.
            if own is not None and getattr(own, "__func__", None) is not type(module).forward:
                raise ModelError(
                    f"{'.'.join(filter(None, (block, name)))} has a forward of its own, set on the instance (a patched "
                    "kernel, a hook of accelerate that does more than to bring in weights): a copy of the block would still "
                    "run the original layers. Remove it first (accelerate.hooks.remove_hook_from_module(model, recurse=True), "
                    "or load the model without it), and put it back afterwards"
                )
    holders: dict[object, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(_memory(parameter), []).append(name)
    for site in sites:
        for edge in site.edges:
            layer = model.get_submodule(f"{site.block}.{edge.module}")
            for parameter in layer.parameters(recurse=False):
                shared = holders[_memory(parameter)]
                if len(shared) > 1:
                    raise ModelError(
                        f"{' and '.join(shared[:4])} are one parameter: it cannot be cut in one place only. Give every layer "
                        "its own copy first (layer.weight = torch.nn.Parameter(layer.weight.detach().clone()))"
                    )


def count_parameters(modules: Iterable[nn.Module]) -> int:
    """Parameters in some modules; one that several share counts once.

    Between passes tied weights of a dispatched model are no longer one object: they are known by their names.
    """
    counted: dict[int, int] = {}
    for module in modules:
        tied = getattr(module, "all_tied_weights_keys", {})
        for name, parameter in module.named_parameters():
            if not (parameter.is_meta and name in tied and is_dispatched(module)):
                counted[id(parameter)] = parameter.numel()
    return sum(counted.values())


def _memory(parameter: Tensor) -> object:
    """Equal for parameters that are one, or that see the same memory, transposed or not."""
    return id(parameter) if parameter.is_meta or not parameter.numel() else (parameter.device, parameter.data_ptr())
