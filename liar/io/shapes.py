"""From the shapes of stored tensors to a class that builds just these shapes: what loading a pruned model needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import nan
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from transformers.utils.hub import cached_file

from liar.errors import CheckpointError
from liar.models import Edge, Site, base_and_prefix, layer_of, layout_of
from liar.surgery import cut_site

# Units of a site; a damaged configuration should not ask for all memory there is.
MOST = 2**24

Shapes = Mapping[str, tuple[int, ...]]


def stored_shapes(where: str, variant: str | None, place: Mapping[str, Any]) -> Shapes:
    """Shapes of all tensors in the weight files of a folder or a repository; of safetensors files only headers are read.

    Args:
        where: folder, or name on the hub.
        variant: as for `from_pretrained`.
        place: arguments of `cached_file`, such as `revision`.

    Returns:
        By tensor name; empty where there is no weight file.

    Raises:
        CheckpointError: a file is missing or damaged, or an index names files that are not in the folder.
    """

    def find(name: str, **more: Any) -> str | None:
        stem, _, end = name.rpartition(".")
        return cached_file(where, f"{stem}.{variant}.{end}" if variant else name, **place, **more)

    try:
        # In the order in which transformers looks.
        for single, index, read in (
            (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, _header),
            (WEIGHTS_NAME, WEIGHTS_INDEX_NAME, _pickled),
        ):
            if (file := find(single, _raise_exceptions_for_missing_entries=False)) is not None:
                return read(file)
            if (file := find(index, _raise_exceptions_for_missing_entries=False)) is not None:
                names = sorted(set(json.loads(Path(file).read_text(encoding="utf-8"))["weight_map"].values()))
                if outside := [name for name in names if Path(name).name != name]:
                    raise ValueError(f"{Path(file).name} names {outside[0]!r}, which is not a file of the folder")
                files = [cached_file(where, name, **place) for name in names]
                return {name: shape for file in files if file is not None for name, shape in read(file).items()}
        return {}
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RuntimeError,
        UnpicklingError,
        SafetensorError,
    ) as error:
        raise CheckpointError(
            f"{where}: expected whole weight files, got {type(error).__name__}: {error}. "
            "The folder is damaged or incomplete: copy or save it again"
        ) from error


def _pickled(file: str) -> dict[str, tuple[int, ...]]:
    # Only tensors and plain values are unpickled: nothing of the file runs.
    content = torch.load(file, map_location="meta", weights_only=True)
    return {name: tuple(value.shape) for name, value in content.items() if isinstance(value, Tensor)}


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
        for site in layout_of(self).sites:
            _fit(self, site, shapes, where)

    names = {"__init__": build, "__module__": stock.__module__, "__qualname__": stock.__qualname__}
    return type(stock.__name__, (stock,), names)


def differences(shapes: Shapes, built: nn.Module, *, extra: bool) -> str:
    """How a model of some shapes differs from one that its class has built, in words; "" if it does not.

    Args:
        shapes: of the model, by name in its state dict.
        built: by its class.
        extra: whether what the class does not build is a difference outside of the blocks as well.
    """
    expected = {name: tuple(value.shape) for name, value in built.state_dict().items()}
    parents = {stack[0].rpartition(".")[0] for stack in layout_of(built).stacks}
    found = [f"{name} is missing" for name in expected.keys() - shapes.keys()]
    found += [
        f"{name} is {list(shapes[name])} and not {list(expected[name])}"
        for name in expected.keys() & shapes.keys()
        if shapes[name] != expected[name]
    ]
    inside = tuple(f"{parent}." for parent in parents)
    found += [f"{name} has no place" for name in shapes.keys() - expected.keys() if extra or name.startswith(inside)]
    return ", ".join(sorted(found)[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def _fit(model: nn.Module, site: Site, shapes: Shapes, where: str) -> None:
    block = model.get_submodule(site.block)
    site = _fit_queries(model, block, site, shapes)
    units = _units(model, site, shapes, where)
    if units is None:
        return
    if site.units > MOST:
        raise CheckpointError(f"{where}, {site.name}: config.json says {site.units} units, more than any model has")
    if units < site.units:
        # Which units is of no account: their values are about to be loaded. Models are built on the meta device.
        cut_site(block, site, torch.arange(site.units, device="cpu") < units)
    consumer = layer_of(block, site.consumer)
    if consumer.bias is None and _stored(model, f"{site.module}.bias", shapes):
        consumer.add_bias()


def _fit_queries(model: nn.Module, block: nn.Module, site: Site, shapes: Shapes) -> Site:
    """Cut the query heads of every group to as many as are stored; the site as it is then."""
    by_query = site.by_query
    if by_query is None:
        return site
    queries = {edge.module for edge in by_query.edges}
    widths = {edge: _stored_width(model, site, edge, shapes) for edge in site.edges}
    groups = {width / edge.width for edge, width in widths.items() if width and edge.module not in queries}
    heads = {width * site.query_heads / edge.width for edge, width in widths.items() if width and edge.module in queries}
    if len(groups) != 1 or len(heads) != 1:
        return site  # `_units` says what is wrong
    of_group = heads.pop() / groups.pop()
    if not of_group.is_integer() or not 1 <= of_group < site.query_heads:
        return site
    ranks = torch.arange(site.query_heads, device="cpu").repeat(site.units)
    cut_site(block, by_query, ranks < of_group)
    return layout_of(model)[site.name]


def _stored_width(model: nn.Module, site: Site, edge: Edge, shapes: Shapes) -> int | None:
    """Channels of a site in a layer as it is stored; None where there is no such matrix."""
    shape = _stored(model, f"{site.block}.{edge.module}.weight", shapes)
    axes = layer_of(model.get_submodule(site.block), edge).storage.axes
    return shape[axes.index(edge.axis)] if shape is not None and len(shape) == 2 else None


def _units(model: nn.Module, site: Site, shapes: Shapes, where: str) -> int | None:
    """How many units the stored shapes of a site have; None where the file names its tensors in another way."""
    listed: dict[str, tuple[int, ...] | None] = {}
    units: set[float] = set()
    for edge in site.edges:
        name = f"{site.block}.{edge.module}.weight"
        listed[name] = _stored(model, name, shapes)
        if (width := _stored_width(model, site, edge, shapes)) is not None:
            units.add(width / edge.width)
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
