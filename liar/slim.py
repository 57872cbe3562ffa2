"""Cutting layers for good: smaller parameters, right sizes on the modules, right sizes in the configuration."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from liar.dropped import without_heads
from liar.families import SitePattern, discover, family_of
from liar.mask import Mask
from liar.sites import Axis, Layout, Site, linear


def cut(layer: nn.Linear, axis: Axis, channels: Tensor) -> None:
    """Keep only some output or input channels of a layer: `channels` int64 indices. Parameters are replaced, not changed."""
    channels = channels.to(layer.weight.device)
    kept = layer.weight.detach().index_select(0 if axis == "out" else 1, channels)
    layer.weight = nn.Parameter(kept, layer.weight.requires_grad)
    if axis == "in":
        layer.in_features = len(channels)
        return
    layer.out_features = len(channels)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach().index_select(0, channels), layer.bias.requires_grad)


def cut_site(block: nn.Module, site: Site, keep: Tensor) -> None:
    """Cut the producers and the consumer of a site to the kept units, and correct the sizes its modules remember.

    Where nothing is kept, layers stay in place without channels, and attention gets a stand-in.
    """
    for edge in (*site.producers, site.consumer):
        cut(linear(block, edge), edge.axis, edge.channels(keep))
    if site.kind == "heads" and not keep.any():
        assert site.mixer is not None, site.name
        without_heads(block.get_submodule(site.mixer), site)
    for path in site.counts:
        owner, _, name = path.rpartition(".")
        module = block.get_submodule(owner)
        setattr(module, name, getattr(module, name) // site.units * int(keep.sum()))


def student(block: nn.Module) -> nn.Module:
    """A copy of a block with modules of its own but the same parameters and buffers: cutting it leaves the block alone."""
    configs = [module.config for module in block.modules() if hasattr(module, "config")]
    return copy.deepcopy(block, {id(shared): shared for shared in (*block.parameters(), *block.buffers(), *configs)})


def adopt(block: nn.Module, other: nn.Module) -> None:
    """Give the layers of a block the (new) parameters and sizes of its cut copy; modules and their hooks stay."""
    for module, cut_module in zip(block.modules(), other.modules(), strict=True):
        if type(module) is not type(cut_module):
            module.__class__ = type(cut_module)
        for name, parameter in cut_module.named_parameters(recurse=False):
            setattr(module, name, parameter)
        for name, value in vars(cut_module).items():
            if type(value) is int and vars(module).get(name) != value:
                setattr(module, name, value)


def uniform_sizes(model: nn.Module) -> dict[str, int] | None:
    """Entries of the configuration with which the stock class builds just a slim model's shapes; None if there are none.

    There are some where every layer keeps equally many units of each kind and the class can express the number. Nothing is
    assumed about the class: it is built on the meta device, and its shapes are compared with the model's.
    """
    stock, now = skeleton(model, {}), discover(model)
    if stock is None or now.dropped:
        return None
    sizes: dict[str, int] = {}
    built = discover(stock)
    for pattern in family_of(model).patterns:
        slim_units, stock_units = ({site.units for site in layout.of_kind(pattern.kind)} for layout in (now, built))
        if len(slim_units) != 1 or len(stock_units) != 1:
            return None
        sizes |= scaled_sizes(model, pattern, min(slim_units), min(stock_units))
    again = skeleton(model, sizes)
    return sizes if again is not None and shapes(again) == shapes(model) else None


def scaled_sizes(model: nn.Module, pattern: SitePattern, units: int, of: int) -> dict[str, int]:
    """Entries of the configuration that go with the units of one kind, for `units` where they stand for `of` now."""
    return {key: getattr(model.config, key) * units // of for key in pattern.sizes}


def stock_counts(model: nn.Module) -> dict[str, list[int]]:
    """For each kind, how many units every layer may keep so that the stock class can still build the model.

    A class refuses some numbers, and takes others to mean something else (BERT: fewer heads are wider heads). So every number
    of heads is tried; of neurons, if one fewer can be had, so can any number.
    """
    layout, found = discover(model), dict[str, list[int]]()
    for pattern in family_of(model).patterns:
        units = max(site.units for site in layout.of_kind(pattern.kind))
        tried = range(1, units + 1) if pattern.unit_width else [max(1, units - 1)]
        legal = [count for count in tried if _is_stock(model, layout, pattern, count)]
        found[pattern.kind] = legal if pattern.unit_width or not legal else list(range(1, units + 1))
    return found


def _is_stock(model: nn.Module, layout: Layout, pattern: SitePattern, count: int) -> bool:
    """Whether the stock class with `count` units of one kind in every layer has such units, and else what it has now."""
    built = skeleton(model, scaled_sizes(model, pattern, count, layout.of_kind(pattern.kind)[0].units))
    if built is None:
        return False
    wanted = [(s.name, count if s.kind == pattern.kind else s.units, s.producers, s.consumer) for s in layout.sites]
    return wanted == [(s.name, s.units, s.producers, s.consumer) for s in discover(built).sites]


def shapes(model: nn.Module) -> Mapping[str, torch.Size]:
    """Shape of every entry of the state dict."""
    return {name: value.shape for name, value in model.state_dict().items()}


def skeleton(model: nn.Module, sizes: Mapping[str, int]) -> nn.Module | None:
    """A model of the same class as its configuration, with `sizes` changed, builds it, on the meta device; None if refused."""
    config: Any = copy.deepcopy(model.config)
    with torch.device("meta"):
        try:
            for key, value in sizes.items():
                setattr(config, key, value)
            # Made anew, so that the class checks its entries: what it refuses here it would refuse to load.
            return type(model)(type(config).from_dict(config.to_dict()))
        except Exception:  # noqa: BLE001 (every class refuses a configuration in its own way)
            return None


def remove(model: nn.Module, mask: Mask) -> None:
    """Cut every site of a model to the kept units and repair nothing: the baseline of every reconstruction."""
    for site in discover(model).sites:
        cut_site(model.get_submodule(site.block), site, mask[site.name])
    note_sizes(model)


def note_sizes(model: nn.Module) -> None:
    """Correct the configuration where it can express the slim model's widths."""
    for key, value in (uniform_sizes(model) or {}).items():
        setattr(model.config, key, value)
