"""The known families of models, and `discover`, which applies a family's table to a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from importlib import import_module
from operator import attrgetter
from pkgutil import iter_modules
from typing import Any

from torch import nn

from liar.errors import ModelError
from liar.models import tables
from liar.models.family import Family, FusedProducer
from liar.models.layers import LayerView, storage_of
from liar.models.layout import Edge, Layout, Segment, Site
from liar.models.ownership import check_model, check_owned, count_parameters
from liar.models.refused import REFUSED


def _shipped() -> Iterator[Family]:
    """The tables in the files of `liar/models/tables`: a new file there is known without another change."""
    for module in sorted(iter_modules(tables.__path__), key=lambda actual: actual.name):
        yield from import_module(f"{tables.__name__}.{module.name}").FAMILIES


_FAMILIES: dict[str, Family] = {family.model_type: family for family in _shipped()}


def register(family: Family) -> None:
    """Make a family known to every function of this library; an entry of the same `model_type` is replaced.

    Check a new family with `liar.testing.check_family` on a tiny random model.

    Example:
        >>> from dataclasses import replace
        >>> from liar.models.tables.bert import BERT
        >>> liar.register(replace(BERT, model_type="my-bert"))
        >>> _ = _FAMILIES.pop("my-bert")

    Raises:
        ModelError: it is no `Family`.
    """
    if not isinstance(family, Family):
        raise ModelError(f"expected a liar.Family, got a {type(family).__name__}")
    _FAMILIES[family.model_type] = family


def families() -> tuple[Family, ...]:
    """All known families.

    Example:
        >>> {"bert", "gpt2", "llama"} <= {family.model_type for family in liar.families()}
        True
    """
    return tuple(_FAMILIES.values())


def family_of(model: nn.Module) -> Family:
    """The family of a Hugging Face model.

    Raises:
        ModelError: the model has no `config.model_type`, or one that nobody registered.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if isinstance(model_type, str) and model_type in _FAMILIES:
        return _FAMILIES[model_type]
    actual = f"config.model_type={model_type!r}" if model_type else f"a {type(model).__name__} without config.model_type"
    if model_type in REFUSED:
        raise ModelError(f"{actual} cannot be cut: {REFUSED[model_type]}")
    near = ", ".join(get_close_matches(str(model_type), _FAMILIES, n=3))
    among = f" (among them {near})" if near else ""
    raise ModelError(
        f"expected a model of a known family, got {actual}; `liar families` lists the {len(_FAMILIES)} that are known"
        f"{among}; liar.propose_family(model, batch) looks for the table of another one, liar.register adds it, see "
        "docs/extending.md"
    )


def base_and_prefix(model: nn.Module) -> tuple[nn.Module, str]:
    """The bare model inside a model with a task head, and the prefix of its modules' names ("" or "bert.")."""
    base = getattr(model, "base_model", model)
    return base, next(f"{name}." if name else "" for name, module in model.named_modules() if module is base)


def takes_choices(model: nn.Module) -> bool:
    """Whether a model's head reads [questions, choices, length] (multiple choice)."""
    return any(kind.__name__.endswith("ForMultipleChoice") for kind in type(model).__mro__)


def discover_with_weights(model: nn.Module) -> Layout:
    """`discover`, for a model whose weights are about to be read.

    Raises:
        ModelError: as `discover`; or the model is on the meta device.
    """
    check_model(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError(
            "the model is on the meta device: its weights are not there; load it with real weights (without "
            'device_map="auto" offloading, or with enough memory)'
        )
    return discover(model)


def discover(model: nn.Module) -> Layout:
    """Find all sites of a model, dense or already cut: sizes are read off the layers, not off the configuration.

    Args:
        model: a Hugging Face model of a known family; it is not changed.

    Returns:
        The model's `Layout`: its sites in the order of the data, its blocks, and the parameters in them.

    Raises:
        ModelError: unknown family, the model's modules are not what the family's table says, or its layers cannot be
            rewritten: it is wrapped or quantised, layers share a weight, a module has a forward of its own.

    Example:
        >>> layout = liar.discover(model)
        >>> [site.name for site in layout.sites]
        ['heads.0', 'neurons.0', 'heads.1', 'neurons.1']
    """
    check_model(model)
    return layout_of(model, family_of(model))


def layout_of(model: nn.Module, family: Family) -> Layout:
    """Find all sites of a model by a table, registered or not.

    Raises:
        ModelError: as `discover`, if the family is known.
    """
    _check_configuration(model, family)
    base, prefix = base_and_prefix(model)
    try:
        blocks = [f"{prefix}{family.blocks}.{i}" for i in range(len(base.get_submodule(family.blocks)))]  # type: ignore[arg-type]
        sites = tuple(
            _site(model, family, block, layer, i) for layer, block in enumerate(blocks) for i in range(len(family.patterns))
        )
    except (AttributeError, TypeError, ZeroDivisionError) as error:
        raise ModelError(
            f"the table of family {family.model_type!r} does not fit this {type(model).__name__}: {error}"
        ) from error
    if len({id(model.get_submodule(block)) for block in blocks}) < len(blocks):
        raise ModelError(f"{type(model).__name__} uses one block for several layers; shared blocks cannot be cut one by one")
    if len({site.name for site in sites}) < len(sites):
        raise ModelError(f"the table of family {family.model_type!r} has two patterns of one kind; expected one each")
    check_owned(model, sites)
    covered = {f"{site.block}.{edge.module}" for site in sites for edge in site.edges}
    return Layout(
        sites=sites,
        blocks=tuple(blocks),
        parameters=count_parameters(model.get_submodule(block) for block in blocks),
        uncovered=tuple(
            f"{block}.{name}"
            for block in blocks
            for name, module in model.get_submodule(block).named_modules()
            if storage_of(module) and f"{block}.{name}" not in covered
        ),
        is_pre_norm=family.is_pre_norm,
    )


@contextmanager
def registered(family: Family) -> Iterator[None]:
    """Make a family known until the block ends; what was known for its `model_type` before is then known again."""
    before = _FAMILIES.get(family.model_type)
    register(family)
    try:
        yield
    finally:
        if before is None:
            _FAMILIES.pop(family.model_type, None)
        else:
            register(before)


def _check_configuration(model: nn.Module, family: Family) -> None:
    """Check that a model is built as its family's table says."""
    for name, value in family.requires:
        if (actual := getattr(model.config, name, value)) != value:
            raise ModelError(
                f"{type(model).__name__}: models of family {family.model_type!r} are cut with {name}={value!r} in their "
                f"configuration, got {actual!r}, which builds other blocks; describe them in a table of your own "
                "(liar.register, see docs/extending.md)"
            )


def _is_parallel(model: nn.Module, family: Family) -> bool:
    """What a table says, or the entry of the configuration that it names."""
    named = family.is_parallel
    told: Any = getattr(model.config, named, None) if isinstance(named, str) else named
    if not isinstance(told, bool):
        raise ModelError(
            f"the table of family {family.model_type!r} names the entry {named!r} of the configuration as is_parallel: "
            f"expected True or False there, got {told!r}"
        )
    return told


def _site(model: nn.Module, family: Family, block_name: str, layer: int, number: int) -> Site:
    block, pattern = model.get_submodule(block_name), family.patterns[number]
    consumer = _layer(block, block_name, pattern.consumer)
    head, heads = (attrgetter(path)(block) if path else 1 for path in (pattern.unit_width, pattern.group_size))
    units, rest = divmod(consumer.size("in"), head * heads)
    if rest or not units:
        raise ModelError(
            f"{block_name}.{pattern.consumer} has {consumer.size('in')} input channels, which are not whole units of "
            f"{head * heads}; check unit_width and group_size in the table of family {family.model_type!r}"
        )
    producers = tuple(_producer(block, block_name, producer, units) for producer in pattern.producers)
    reader = Edge(pattern.consumer, "in", (Segment(0, head * heads, head * heads),))
    made = dict(block.named_parameters())
    rows = tuple(path for path in pattern.unit_parameters if path in made)
    earlier = tuple(other.output_norm or other.consumer for other in family.patterns[:number])
    names = tuple(edge.module for edge in producers)
    site = Site(
        name=f"{pattern.kind}.{layer}",
        kind=pattern.kind,
        layer=layer,
        units=units,
        producers=producers,
        consumer=reader,
        block=block_name,
        residual=pattern.residual,
        added_before=earlier if _is_parallel(model, family) else (),
        sublayer=pattern.sublayer,
        size_attributes=pattern.size_attributes,
        output_scale=pattern.output_scale,
        output_norm=pattern.output_norm,
        unit_parameters=rows,
        head_argument=pattern.head_argument,
        query_heads=heads,
        parameters=sum(_unit_parameters(block, edge) for edge in (*producers, reader))
        + sum(block.get_parameter(path).numel() // units for path in rows),
        out=consumer.size("out"),
        inputs=names,
    )
    return replace(site, by_query=_by_query(block, site, pattern.group_size)) if heads > 1 else site


def _by_query(block: nn.Module, site: Site, group_size: str | None) -> Site | None:
    """A site with a query head as its unit; None where queries have no layer of their own."""
    units, head = site.units * site.query_heads, site.consumer.width // site.query_heads
    one_head = (Segment(0, head, head),)
    queries = tuple(
        replace(edge, segments=one_head)
        for edge in site.producers
        if len(edge.segments) == 1 and edge.width == site.consumer.width
    )
    if not queries:
        return None
    reader = replace(site.consumer, segments=one_head)
    rows = tuple(path for path in site.unit_parameters if len(block.get_parameter(path)) % units == 0)
    sizes = (path for path in site.size_attributes if attrgetter(path)(block) % units == 0)
    return replace(
        site,
        units=units,
        producers=queries,
        consumer=reader,
        size_attributes=tuple(filter(None, (group_size, *sizes))),
        unit_parameters=rows,
        query_heads=1,
        parameters=sum(_unit_parameters(block, edge) for edge in (*queries, reader))
        + sum(block.get_parameter(path).numel() // units for path in rows),
        groups=site.units,
    )


def _producer(block: nn.Module, block_name: str, producer: str | FusedProducer, units: int) -> Edge:
    fused = producer if isinstance(producer, FusedProducer) else FusedProducer(producer, 1)
    outputs = _layer(block, block_name, fused.module).size("out")
    width, rest = divmod(outputs, fused.parts * units)
    if rest:
        raise ModelError(
            f"{block_name}.{fused.module} has {outputs} output channels, which cannot be divided among {units} units"
            f"{f' in {fused.parts} parts' if fused.parts > 1 else ''}; check the family's table"
        )
    return Edge(fused.module, "out", tuple(Segment(part * units * width, width, width) for part in range(fused.parts)))


def _unit_parameters(block: nn.Module, edge: Edge) -> int:
    """Parameters that leave a layer with one unit."""
    layer = LayerView.of(block.get_submodule(edge.module))
    per_channel = layer.size("in") + (layer.bias is not None) if edge.axis == "out" else layer.size("out")
    return edge.width * per_channel


def _layer(block: nn.Module, block_name: str, name: str) -> LayerView:
    return LayerView.of(block.get_submodule(name), f"{block_name}.{name}")
