"""Where a model can be cut: an `Edge` is one layer that a unit passes through, a `Site` all that belongs together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from liar.errors import ModelError
from liar.models.layers import Axis, LayerView

Kind = Literal["heads", "neurons"]


@dataclass(frozen=True)
class Segment:
    """Channels of all units in one layer: unit u has channels offset + u * stride to offset + u * stride + width - 1."""

    offset: int
    width: int
    stride: int

    def by_unit(self, units: int) -> Tensor:
        """The channels of every unit, int64 [units, width]."""
        return self.offset + self.stride * torch.arange(units)[:, None] + torch.arange(self.width)


@dataclass(frozen=True)
class Edge:
    """One layer that carries the channels of a site's units.

    Attributes:
        module: name of the layer inside its transformer block.
        axis: `"out"` if the units are its output channels (a producer), `"in"` if its input channels (the consumer).
        segments: where the channels of a unit are; several where one layer computes query, key and value together.
    """

    module: str
    axis: Axis
    segments: tuple[Segment, ...]

    @property
    def width(self) -> int:
        """Channels of one unit in this layer."""
        return sum(segment.width for segment in self.segments)

    def by_unit(self, units: int) -> Tensor:
        """The channels of every unit, int64 [units, width]."""
        return torch.cat([segment.by_unit(units) for segment in self.segments], 1)

    def channels(self, unit_mask: Tensor) -> Tensor:
        """The channels of the kept units in ascending order: bool [units] -> int64 [kept * width]."""
        return self.by_unit(len(unit_mask))[unit_mask].flatten().sort().values


@dataclass(frozen=True)
class HeadArgument:
    """An argument of the attention that has an entry for each head, made outside of the block: a bias by position, say.

    Once heads are cut, those entries are selected that belong to the kept ones. T5's first block makes it and hands it on, with
    entries for all heads.

    Attributes:
        module: whose forward takes it, relative to the block.
        name: of the argument.
        position: its index among the positional arguments, where it is passed as one of them.
        dim: the dimension of its heads.
        with_sequences: whether that dimension counts sequences, too, and for each of them its heads.
        returned: where the module hands the argument on, its index among the values it returns.
        maker: module (relative to `module`) that makes it where none comes in, with the heads last; other blocks have none.

    Example:
        >>> HeadArgument("attention.attn", "position_bias", position=2, dim=1).with_sequences
        False
    """

    module: str
    name: str
    position: int
    dim: int
    with_sequences: bool = False
    returned: int | None = None
    maker: str | None = None


@dataclass(frozen=True)
class Site:
    """A consumer layer whose input channels can be removed in units, with the producers that lose them too.

    Attributes:
        name: `"heads.3"` or `"neurons.3"`: kind and layer; the same for every head class of a model.
        units: number of units now (heads, groups of heads that share a key and value head, or neurons).
        producers: layers whose output channels belong to the units.
        consumer: the layer whose input channels belong to the units.
        block: full name of the transformer block that holds the site; all other names are relative to it.
        residual: module, and the index of the positional argument of its forward that is the residual stream.
        added_before: modules of the same block whose output is added to the same residual stream before this site's
            (parallel blocks); empty where the residual stream already contains them (sequential blocks).
        sublayer: module whose output may be replayed, if there is one (see `SitePattern`).
        size_attributes: attribute paths of integers in proportion to the number of units, corrected when cutting.
        output_scale: attribute path of what the consumer's output is multiplied by before it is added (see `SitePattern`).
        output_norm: module that normalises the consumer's output before it is added.
        unit_parameters: paths of further parameters that lose rows with the units.
        head_argument: an argument of the attention that has an entry for each head.
        query_heads: query heads per unit (1 for neurons and for attention without groups).
        inputs: the layers that the units come from, cut with them or not.
        stack: number of the stack of blocks that it is in: 1 for those of a decoder that reads what an encoder gives.
        groups: query heads that share keys and values are in so many groups of equal size, of which all keep equally many;
            0 for other units.
        by_query: the same site with a query head as its unit, where keys and values are shared and stay; None elsewhere.
        parameters: parameters removed with one unit.
        out: output channels of the consumer.

    Example:
        >>> site = liar.discover(model)["neurons.0"]
        >>> site.module, site.units, [edge.module for edge in site.producers]
        ('encoder.layer.0.output.dense', 64, ['intermediate.dense'])
    """

    name: str
    kind: Kind
    layer: int
    units: int
    producers: tuple[Edge, ...]
    consumer: Edge
    block: str
    residual: tuple[str, int]
    added_before: tuple[str, ...]
    sublayer: str | None
    size_attributes: tuple[str, ...]
    output_scale: str | None
    output_norm: str | None
    unit_parameters: tuple[str, ...]
    head_argument: HeadArgument | None
    query_heads: int
    parameters: int
    out: int
    inputs: tuple[str, ...]
    stack: int = 0
    groups: int = 0
    by_query: Site | None = None

    @property
    def module(self) -> str:
        """Full name of the consumer inside the model."""
        return f"{self.block}.{self.consumer.module}"

    @property
    def added(self) -> str:
        """The module whose output is added to the residual stream, but for the scale: the consumer, or the norm after it."""
        return self.consumer.module if self.output_norm is None else self.output_norm

    @property
    def edges(self) -> tuple[Edge, ...]:
        """All layers of the site."""
        return (*self.producers, self.consumer)


@dataclass(frozen=True)
class Layout:
    """All sites of one model, in the order in which data passes them.

    Attributes:
        sites: in the order of the data.
        stacks: full names of the transformer blocks of every stack, in the order of the data: those of an encoder, and those of
            a decoder that reads what the encoder gives; of most models, one stack.
        parameters: parameters in all blocks together (the base that budgets refer to).
        uncovered: linear layers inside the blocks that belong to no site, so are never cut.
        is_pre_norm: whether a block outputs its last residual sum as it is (see `Family`).

    Example:
        >>> layout = liar.discover(model)
        >>> layout.blocks
        ('encoder.layer.0', 'encoder.layer.1')
        >>> [site.name for site in layout.of_kind("neurons")], layout["heads.1"].units
        (['neurons.0', 'neurons.1'], 4)
    """

    sites: tuple[Site, ...]
    stacks: tuple[tuple[str, ...], ...]
    parameters: int
    uncovered: tuple[str, ...]
    is_pre_norm: bool

    def __getitem__(self, name: str) -> Site:
        return next(site for site in self.sites if site.name == name)

    @property
    def blocks(self) -> tuple[str, ...]:
        """Full names of the transformer blocks of all stacks."""
        return tuple(block for stack in self.stacks for block in stack)

    def stack_of(self, block: str) -> int:
        """Number of the stack that a block is in."""
        return next(number for number, names in enumerate(self.stacks) if block in names)

    def of_kind(self, kind: str) -> tuple[Site, ...]:
        """The sites of one kind, by layer."""
        return tuple(site for site in self.sites if site.kind == kind)

    def of_block(self, block: str) -> tuple[Site, ...]:
        """The sites of one block, in the order of the data."""
        return tuple(site for site in self.sites if site.block == block)

    @property
    def first_sites(self) -> tuple[Site, ...]:
        """The sites of the first block of every stack: all others come after them."""
        return tuple(site for stack in self.stacks for site in self.of_block(stack[0]))

    def counted_by(self, heads: str) -> Layout:
        """The layout whose units of attention are groups of heads (`"group"`), or single query heads (`"query"`)."""
        if heads == "group":
            return self
        return replace(self, sites=tuple(site.by_query or site for site in self.sites))

    def matching(self, masks: Mapping[str, Tensor]) -> Layout:
        """The layout whose units are those that a mask counts, site by site: groups of heads, or query heads."""

        def matched(site: Site) -> Site:
            other = site.by_query
            return other if other is not None and len(masks.get(site.name, ())) == other.units else site

        return replace(self, sites=tuple(matched(site) for site in self.sites))

    def kept_parameters(self, kept: Mapping[str, int]) -> int:
        """Parameters left in the blocks when `kept` units remain per site name."""
        return self.parameters - sum(site.parameters * (site.units - kept[site.name]) for site in self.sites)


def layer_of(block: nn.Module, edge: Edge) -> LayerView:
    """The layer of an edge inside its block."""
    return LayerView.of(block.get_submodule(edge.module), edge.module)


def check_one_stack(layout: Layout, model: nn.Module, what: str) -> None:
    """Check that a model has one stack of blocks, for what knows no others.

    Raises:
        ModelError: it has an encoder and a decoder.
    """
    if len(layout.stacks) > 1:
        raise ModelError(
            f"{what}: expected a model with one stack of blocks, got a {type(model).__name__}, which has an encoder and a "
            "decoder; liar.prune and liar.reconstruct take it"
        )
