"""What the stock class of a model can build: found by building it on the meta device, never assumed."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from liar.errors import CheckpointError, ModelError
from liar.models import Layout, Site, SitePattern, family_of, layout_of, stacks_of

# Parts a class builds unless an argument of its constructor is False -> the module. No configuration says so.
OPTIONAL_PARTS = {"add_pooling_layer": "pooler"}


def uniform_sizes(model: nn.Module) -> dict[str, int] | None:
    """Entries of the configuration with which the stock class builds just a pruned model's shapes; None if there are none.

    There are some where every layer keeps equally many units of each kind and the class can express the number. Nothing is
    assumed about the class: it is built on the meta device, and its shapes are compared with the model's.
    """
    stock = build_stock(model, {})
    if stock is None:
        return None
    sizes: dict[str, int] = {}
    pruned, built = layout_of(model), layout_of(stock)
    for number, pattern in patterns_of(model):
        sites = [[site for site in each.of_kind(pattern.kind) if site.stack == number] for each in (pruned, built)]
        widths, stock_widths = ({Width.of(site) for site in each} for each in sites)
        if len(widths) != 1 or len(stock_widths) != 1:
            return None
        sizes |= scaled_sizes(model, pattern.config_keys, widths.pop(), stock_widths.pop())
    again = build_stock(model, sizes)
    return sizes if again is not None and shapes(again) == shapes(model) else None


@dataclass(frozen=True)
class Width:
    """How wide a site is: units, and for heads the query heads in each of them."""

    units: int
    query_heads: int = 1

    @classmethod
    def of(cls, site: Site) -> Width:
        """Of a site whose units of attention are groups."""
        return cls(site.units, site.query_heads)


def scaled_sizes(model: nn.Module, keys: Iterable[str], width: Width, now: Width) -> dict[str, int]:
    """Entries of the configuration that go with the units of one kind, by `keys`, for another width where they stand for `now`.

    An entry that is None (GPT-2's `n_inner`: the class then takes its default) is the number of units itself, and stays None
    where that is the default. Where keys and values are shared, the entry of that number counts query heads.
    """
    heads, units = width.units * width.query_heads, width.units
    values = {key: getattr(model.config, key) for key in keys}

    def scaled(value: int | None) -> int:
        if value is None:
            return units
        return heads if value == now.units * now.query_heads else value * units // now.units

    return {key: scaled(value) for key, value in values.items() if value is not None or units != now.units}


def patterns_of(model: nn.Module) -> list[tuple[int, SitePattern]]:
    """The patterns of all stacks of a model, with the number of the stack."""
    stacks = stacks_of(model, family_of(model))
    return [(number, pattern) for number, stack in enumerate(stacks) for pattern in stack.patterns]


def kind_sizes(model: nn.Module, layout: Layout, kind: str, width: Width) -> dict[str, int]:
    """Entries of the configuration with which all layers of the stock class have such a width of one kind."""
    sizes: dict[str, int] = {}
    for number, pattern in patterns_of(model):
        if pattern.kind == kind:
            now = next(Width.of(site) for site in layout.of_kind(kind) if site.stack == number)
            sizes |= scaled_sizes(model, pattern.config_keys, width, now)
    return sizes


def stock_counts(model: nn.Module, heads: str = "group") -> dict[str, list[int]]:
    """For each kind, how many units every layer may keep so that the stock class can still build the model.

    A class refuses some numbers, and takes others to mean something else (BERT: fewer heads are wider heads). So every number
    of heads is tried; of neurons, if one fewer is possible, so is any number.

    Args:
        model: of a known family.
        heads: `"group"`, or `"query"`: units of attention that share keys and values are then query heads of each group.
    """
    layout, counts = layout_of(model), dict[str, list[int]]()
    for kind in dict.fromkeys(site.kind for site in layout.sites):
        sites = layout.of_kind(kind)
        now = Width(max(site.units for site in sites), sites[0].query_heads)
        if heads == "query" and sites[0].by_query is not None:
            widths = [Width(now.units, count) for count in range(1, now.query_heads + 1)]
            counts[kind] = [width.query_heads for width in widths if _is_stock(model, layout, kind, width)]
            continue
        tried = range(1, now.units + 1) if kind == "heads" else [max(1, now.units - 1)]
        legal = [count for count in tried if _is_stock(model, layout, kind, replace(now, units=count))]
        counts[kind] = legal if kind == "heads" or not legal else list(range(1, now.units + 1))
    return counts


def _is_stock(model: nn.Module, layout: Layout, kind: str, width: Width) -> bool:
    """Whether the stock class with a width of one kind in every layer has such units, and else what it has now."""
    built = build_stock(model, kind_sizes(model, layout, kind, width))
    if built is None:
        return False
    expected = [(site.name, width if site.kind == kind else Width.of(site), _channels(site)) for site in layout.sites]
    try:
        found = [(site.name, Width.of(site), _channels(site)) for site in layout_of(built).sites]
    except ModelError:  # some classes build heads that do not add up to their layers
        return False
    return found == expected and _others(built, layout) == _others(model, layout)


def _others(model: nn.Module, layout: Layout) -> dict[str, torch.Size]:
    """Shapes of the parameters that belong to no site: an entry of the configuration may size more than the blocks."""
    layers = {f"{site.block}.{edge.module}" for site in layout.sites for edge in site.edges}
    rows = {f"{site.block}.{path}" for site in layout.sites for path in site.unit_parameters}
    return {
        name: value.shape
        for name, value in model.named_parameters()
        if name.rpartition(".")[0] not in layers and name not in rows
    }


def _channels(site: Site) -> list[int]:
    """Channels of one head or neuron in every layer of a site."""
    of_queries = {edge.module for edge in site.by_query.edges} if site.by_query else set()
    return [edge.width // (site.query_heads if edge.module in of_queries else 1) for edge in site.edges]


def shapes(model: nn.Module) -> Mapping[str, torch.Size]:
    """Shape of every entry of the state dict."""
    return {name: value.shape for name, value in model.state_dict().items()}


def build_stock(
    model: nn.Module,
    sizes: Mapping[str, Any],
    changed: Callable[[type[nn.Module]], type[nn.Module]] | None = None,
    *,
    device: str = "meta",
) -> nn.Module | None:
    """A model of the same class as its configuration, with `sizes` changed, builds it; None if refused.

    Args:
        model: whose class and configuration.
        sizes: entries of the configuration.
        changed: makes the class that is built from the model's.
        device: where; on the meta device, only shapes are made.
    """
    config: Any = copy.deepcopy(model.config)
    stock = stock_class(model)
    parts = {
        argument: False
        for argument, part in OPTIONAL_PARTS.items()
        if accepts(stock, argument) and getattr(model, part, None) is None
    }
    # Some classes draw random numbers on the CPU, wherever their parameters are.
    with torch.random.fork_rng(devices=[]), torch.device(device):
        try:
            for key, value in sizes.items():
                setattr(config, key, value)
            # Made anew, so that the class checks its entries: what it refuses here it would refuse to load.
            return (changed or (lambda same: same))(stock)(type(config).from_dict(config.to_dict()), **parts)
        except CheckpointError:
            raise
        except Exception:  # noqa: BLE001 (every class refuses a configuration in its own way)
            return None


def accepts(kind: type[nn.Module], argument: str) -> bool:
    """Whether the constructor of a class has an argument of some name."""
    return argument in inspect.signature(kind.__init__).parameters


def stock_class(model: nn.Module) -> type[nn.Module]:
    """The class of a model, or the nearest one above it that needs a configuration and nothing else."""

    def needs_more(kind: type) -> bool:
        parameters = list(inspect.signature(kind.__init__).parameters.values())[2:]  # type: ignore[misc]
        return any(each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD for each in parameters)

    # A class that builds pruned models (`liar.surgery.modeling_pruned`) extends the one that is meant.
    kinds = (kind for kind in type(model).__mro__ if not getattr(kind, "builds_pruned", False))
    return next(kind for kind in kinds if not needs_more(kind))
