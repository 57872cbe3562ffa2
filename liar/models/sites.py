"""Finding the sites of a model: the table of its family applied to its modules."""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from torch import nn

from liar.errors import ModelError
from liar.models.dispatched import check_hooks
from liar.models.family import Family, FusedProducer, SitePattern, Stack
from liar.models.layers import LayerView, storage_of
from liar.models.layout import Edge, Layout, Segment, Site
from liar.models.ownership import check_model, check_owned, count_parameters
from liar.models.registry import family_of
from liar.models.stored import check_weights


def base_and_prefix(model: nn.Module) -> tuple[nn.Module, str]:
    """The bare model inside a model with a task head, and the prefix of its modules' names ("" or "bert.")."""
    base = getattr(model, "base_model", model)
    return base, next(f"{name}." if name else "" for name, module in model.named_modules() if module is base)


def takes_choices(model: nn.Module) -> bool:
    """Whether a model's head reads [questions, choices, length] (multiple choice)."""
    return any(kind.__name__.endswith("ForMultipleChoice") for kind in type(model).__mro__)


def layout_with_weights(model: nn.Module) -> Layout:
    """`layout_of`, for a model whose weights are about to be read.

    Raises:
        ModelError: as `layout_of`; or the model is on the meta device, and no hook of accelerate knows where its weights are.
    """
    check_model(model)
    check_hooks(model)
    check_weights(model)
    return layout_of(model)


def layout_of(model: nn.Module, family: Family | None = None) -> Layout:
    """Find all sites of a model by a table; see `liar.discover`.

    Args:
        model: a Hugging Face model; it is not changed.
        family: its table; that of its registered family if not given.

    Raises:
        ModelError: as `liar.discover`.
    """
    check_model(model)
    family = family_of(model) if family is None else family.fitting(model.config)
    _check_configuration(model, family)
    is_parallel = _is_parallel(model, family)
    try:
        places = _places(model, family)
        sites = tuple(
            _site(model.get_submodule(place.block), family, place, pattern, is_parallel=is_parallel)
            for place in places
            for pattern in place.stack.patterns
        )
    except (AttributeError, TypeError, ZeroDivisionError) as error:
        raise ModelError(
            f"the table of family {family.model_type!r} does not fit this {type(model).__name__}: {error}"
        ) from error
    blocks = [place.block for place in places]
    if len({id(model.get_submodule(block)) for block in blocks}) < len(blocks):
        raise ModelError(f"{type(model).__name__} uses one block for several layers; shared blocks cannot be cut one by one")
    if len({site.name for site in sites}) < len(sites):
        raise ModelError(f"the table of family {family.model_type!r} has two patterns of one kind; expected one each")
    check_owned(model, sites)
    covered = {f"{site.block}.{edge.module}" for site in sites for edge in site.edges}
    stacks = range(1 + max((place.number for place in places), default=0))
    return Layout(
        sites=sites,
        stacks=tuple(tuple(place.block for place in places if place.number == number) for number in stacks),
        parameters=count_parameters(model.get_submodule(block) for block in blocks),
        uncovered=tuple(
            f"{block}.{name}"
            for block in blocks
            for name, module in model.get_submodule(block).named_modules()
            if storage_of(module) and f"{block}.{name}" not in covered
        ),
        is_pre_norm=family.is_pre_norm,
    )


@dataclass(frozen=True)
class _Place:
    """One block: its stack, the number of that, the block's number among all, and its full name."""

    stack: Stack
    number: int
    layer: int
    block: str


def _places(model: nn.Module, family: Family) -> list[_Place]:
    """The blocks of all stacks, in the order of the data."""
    base, prefix = base_and_prefix(model)
    places: list[_Place] = []
    for number, stack in enumerate(stacks_of(model, family)):
        count = len(base.get_submodule(stack.blocks))  # type: ignore[arg-type]
        places += [_Place(stack, number, len(places) + i, f"{prefix}{stack.blocks}.{i}") for i in range(count)]
    return places


def stacks_of(model: nn.Module, family: Family) -> tuple[Stack, ...]:
    """The stacks that a model has: a class may be the encoder of a family alone, as its configuration then says."""
    return family.stacks if getattr(model.config, "is_encoder_decoder", True) else family.stacks[:1]


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


def _site(block: nn.Module, family: Family, place: _Place, pattern: SitePattern, *, is_parallel: bool) -> Site:
    block_name, patterns = place.block, place.stack.patterns
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
    earlier = tuple(other.output_norm or other.consumer for other in patterns[: patterns.index(pattern)])
    names = tuple(edge.module for edge in producers)
    site = Site(
        name=f"{pattern.kind}.{place.layer}",
        kind=pattern.kind,
        layer=place.layer,
        stack=place.number,
        units=units,
        producers=producers,
        consumer=reader,
        block=block_name,
        residual=pattern.residual,
        added_before=earlier if is_parallel else (),
        sublayer=pattern.sublayer,
        size_attributes=pattern.size_attributes,
        output_scale=pattern.output_scale,
        output_norm=pattern.output_norm,
        unit_parameters=rows,
        head_argument=pattern.head_argument,
        query_heads=heads,
        parameters=sum(_parameters_of_unit(block, edge) for edge in (*producers, reader))
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
        parameters=sum(_parameters_of_unit(block, edge) for edge in (*queries, reader))
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


def _parameters_of_unit(block: nn.Module, edge: Edge) -> int:
    """Parameters that leave a layer with one unit."""
    layer = LayerView.of(block.get_submodule(edge.module))
    per_channel = layer.size("in") + (layer.bias is not None) if edge.axis == "out" else layer.size("out")
    return edge.width * per_channel


def _layer(block: nn.Module, block_name: str, name: str) -> LayerView:
    return LayerView.of(block.get_submodule(name), f"{block_name}.{name}")
