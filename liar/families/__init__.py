"""Families of models: one table each, a registry by `config.model_type`, and `discover`, which applies the table.

Example:
    >>> import liar
    >>> [family.model_type for family in liar.families.registered()]
    ['bert', 'llama']
"""

from __future__ import annotations

from operator import attrgetter

from torch import nn

from liar.errors import ModelError
from liar.families.bert import BERT
from liar.families.llama import LLAMA
from liar.families.table import Family, SitePattern
from liar.sites import Edge, Layout, Site, site_name

__all__ = ["Family", "SitePattern", "base_and_prefix", "checked", "discover", "family_of", "register", "registered"]

_FAMILIES: dict[str, Family] = {family.model_type: family for family in (BERT, LLAMA)}


def register(family: Family) -> None:
    """Make a family known to every function of this library; an entry of the same `model_type` is replaced.

    Check a new family with `liar.testing.check_family` on a tiny random model.

    Example:
        >>> from dataclasses import replace
        >>> from liar.families.bert import BERT
        >>> register(replace(BERT, model_type="my-bert"))
        >>> _ = _FAMILIES.pop("my-bert")
    """
    _FAMILIES[family.model_type] = family


def registered() -> tuple[Family, ...]:
    """All known families."""
    return tuple(_FAMILIES.values())


def family_of(model: nn.Module) -> Family:
    """The family of a Hugging Face model.

    Raises:
        ModelError: the model has no `config.model_type`, or one that nobody registered.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in _FAMILIES:
        return _FAMILIES[model_type]
    came = f"config.model_type={model_type!r}" if model_type else f"a {type(model).__name__} without config.model_type"
    raise ModelError(
        f"expected a model of a known family ({', '.join(_FAMILIES)}), got {came}; "
        "add the family with liar.register(liar.Family(...)), see docs/extending.md"
    )


def base_and_prefix(model: nn.Module) -> tuple[nn.Module, str]:
    """The bare model inside a model with a task head, and the prefix of its modules' names ("" or "bert.")."""
    base = getattr(model, "base_model", model)
    return base, next(f"{name}." if name else "" for name, module in model.named_modules() if module is base)


def checked(model: nn.Module) -> Layout:
    """The sites of a model whose weights are there to be worked on.

    Raises:
        ModelError: as `discover`; or the model is on the meta device, or all of its sub-layers were dropped.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError(
            "the model is on the meta device: its weights are not there; load it with real weights (without "
            'device_map="auto" offloading, or with enough memory)'
        )
    layout = discover(model)
    if not layout.sites:
        raise ModelError(f"{type(model).__name__}: every sub-layer was dropped, nothing is left to work on")
    return layout


def discover(model: nn.Module) -> Layout:
    """Find all sites of a model, dense or already slimmed: sizes are read off the layers, not off the configuration.

    Raises:
        ModelError: unknown family, or the model's modules are not what the family's table says.
    """
    family = family_of(model)
    base, prefix = base_and_prefix(model)
    try:
        blocks = [f"{prefix}{family.blocks}.{i}" for i in range(len(base.get_submodule(family.blocks)))]  # type: ignore[arg-type]
        places = [(block, layer, pattern) for layer, block in enumerate(blocks) for pattern in family.patterns]
        dropped = [(layer, pattern.kind) for block, layer, pattern in places if _is_dropped(model, block, pattern)]
        sites = tuple(_site(model, *place) for place in places if (place[1], place[2].kind) not in dropped)
    except (AttributeError, TypeError, ZeroDivisionError) as error:
        raise ModelError(
            f"the table of family {family.model_type!r} does not fit this {type(model).__name__}: {error}"
        ) from error
    if len({id(model.get_submodule(block)) for block in blocks}) < len(blocks):
        raise ModelError(f"{type(model).__name__} uses one block for several layers; shared blocks cannot be cut one by one")
    covered = {f"{block}.{name}" for block, _, pattern in places for name in (*pattern.producers, pattern.consumer)}
    return Layout(
        sites=sites,
        blocks=tuple(blocks),
        parameters=sum(p.numel() for block in blocks for p in model.get_submodule(block).parameters()),
        uncovered=tuple(
            f"{block}.{name}"
            for block in blocks
            for name, module in model.get_submodule(block).named_modules()
            if isinstance(module, nn.Linear) and f"{block}.{name}" not in covered
        ),
        dropped=tuple(site_name(kind, layer) for layer, kind in dropped),
    )


def _is_dropped(model: nn.Module, block_name: str, pattern: SitePattern) -> bool:
    return _linear(model.get_submodule(block_name), block_name, pattern.consumer).in_features == 0


def _site(model: nn.Module, block_name: str, layer: int, pattern: SitePattern) -> Site:
    block = model.get_submodule(block_name)
    *producers, consumer = [_linear(block, block_name, name) for name in (*pattern.producers, pattern.consumer)]
    width = attrgetter(pattern.unit_width)(block) if pattern.unit_width else 1
    units = producers[-1].out_features // width
    out_edges = tuple(
        Edge(name, "out", layer.out_features // units) for name, layer in zip(pattern.producers, producers, strict=True)
    )
    in_edge = Edge(pattern.consumer, "in", consumer.in_features // units)
    in_producers = (
        edge.width * (layer.in_features + (layer.bias is not None)) for edge, layer in zip(out_edges, producers, strict=True)
    )
    return Site(
        name=site_name(pattern.kind, layer),
        kind=pattern.kind,
        layer=layer,
        units=units,
        producers=out_edges,
        consumer=in_edge,
        block=block_name,
        residual=pattern.residual,
        mixer=pattern.mixer,
        counts=pattern.counts,
        query_heads=out_edges[0].width // out_edges[-1].width,
        parameters=sum(in_producers) + in_edge.width * consumer.out_features,
        out=consumer.out_features,
    )


def _linear(block: nn.Module, block_name: str, name: str) -> nn.Linear:
    layer = block.get_submodule(name)
    # Quantised layers are subclasses of nn.Linear as often as not; their weights are not what their shape says.
    if not isinstance(layer, nn.Linear) or not layer.weight.is_floating_point() or layer.weight.itemsize < 2:
        raise ModelError(
            f"{block_name}.{name} is a {type(layer).__name__}, expected nn.Linear in float32, bfloat16 or float16. "
            "Quantised or wrapped layers cannot be folded into: load the model unquantised (or merge its adapters), "
            "reconstruct it, then quantise"
        )
    return layer
