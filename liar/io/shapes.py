"""From the shapes of stored tensors to a class that builds just these shapes: what loading a pruned model needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import nan
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from liar.errors import CheckpointError
from liar.models import Site, base_and_prefix, discover, layer_of
from liar.surgery import cut_site

Shapes = Mapping[str, tuple[int, ...]]


def stored_shapes(where: str, variant: str | None, place: Mapping[str, Any]) -> Shapes:
    """Shapes of all tensors in the safetensors files of a folder or a repository; only headers are read.

    Args:
        where: folder, or name on the hub.
        variant: as for `from_pretrained`.
        place: arguments of `cached_file`, such as `revision`.

    Returns:
        By tensor name; empty where there is no safetensors file.

    Raises:
        CheckpointError: a file is missing or damaged.
    """

    def find(name: str, **more: Any) -> str | None:
        stem, _, end = name.rpartition(".")
        return cached_file(where, f"{stem}.{variant}.{end}" if variant else name, **place, **more)

    try:
        single = find(SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
        if single is not None:
            return _header(single)
        index = find(SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
        if index is None:
            return {}
        names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
        files = [cached_file(where, name, **place) for name in names]
        return {name: shape for file in files if file is not None for name, shape in _header(file).items()}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"{where}: expected whole safetensors files, got {type(error).__name__}: {error}. "
            "The folder is damaged or incomplete: copy or save it again"
        ) from error


def _header(file: str) -> dict[str, tuple[int, ...]]:
    with safe_open(file, framework="pt") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118 (not a dict)


def fitted(stock: type[PreTrainedModel], shapes: Shapes, where: str) -> type[PreTrainedModel]:
    """A subclass whose instances are cut, when they are built, to stored shapes; in everything else it is the stock class.

    Hugging Face's own loader can then fill it: dtype, shards, tied weights and buffers are its business.

    Raises:
        CheckpointError: (on building) a site has shapes that no cut of the stock class has.
    """

    def build(self: PreTrainedModel, config: Any, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, config, *args, **kwargs)
        for site in discover(self).sites:
            _fit(self, site, shapes, where)

    names = {"__init__": build, "__module__": stock.__module__, "__qualname__": stock.__qualname__}
    return type(stock.__name__, (stock,), names)


def _fit(model: nn.Module, site: Site, shapes: Shapes, where: str) -> None:
    block = model.get_submodule(site.block)
    units = _units(model, site, shapes, where)
    if units is None:
        return
    if units < site.units:
        # Which units is of no account: their values are about to be loaded. Models are built on the meta device.
        cut_site(block, site, torch.arange(site.units, device="cpu") < units)
    consumer = layer_of(block, site.consumer)
    if consumer.bias is None and _stored(model, f"{site.module}.bias", shapes):
        consumer.add_bias()


def _units(model: nn.Module, site: Site, shapes: Shapes, where: str) -> int | None:
    """How many units the stored shapes of a site have; None where the file names its tensors in another way."""
    listed: dict[str, tuple[int, ...] | None] = {}
    units: set[float] = set()
    for edge in site.edges:
        name = f"{site.block}.{edge.module}.weight"
        shape = listed[name] = _stored(model, name, shapes)
        if shape is not None and len(shape) == 2:
            axes = layer_of(model.get_submodule(site.block), edge).storage.axes
            units.add(shape[axes.index(edge.axis)] / edge.width)
    if not any(listed.values()):
        return None
    count = units.pop() if len(units) == 1 and all(listed.values()) else nan
    if not (count.is_integer() and 1 <= count <= site.units):
        shown = ", ".join(f"{name} {'missing' if shape is None else list(shape)}" for name, shape in listed.items())
        raise CheckpointError(
            f"{where}, {site.name}: expected tensors with one number of units, from 1 to {site.units}, got {shown}. "
            "Weights and config.json do not belong together, or the folder is damaged: save it again"
        )
    return int(count)


def _stored(model: nn.Module, name: str, shapes: Shapes) -> tuple[int, ...] | None:
    """The shape of a tensor, whether the file was written from the bare model or from one with a head."""
    _, prefix = base_and_prefix(model)
    bare = name.removeprefix(prefix)
    candidates = (name, bare, f"{getattr(model, 'base_model_prefix', '')}.{bare}")
    return next((shapes[candidate] for candidate in candidates if candidate in shapes), None)
