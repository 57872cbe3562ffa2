"""Where a model can be cut: an `Edge` is one linear layer a unit passes through, a `Site` all that belongs together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

Kind = Literal["heads", "neurons"]
Axis = Literal["out", "in"]


@dataclass(frozen=True)
class Edge:
    """One `nn.Linear` that carries the channels of a site's units.

    Attributes:
        module: name of the layer inside its transformer block.
        axis: `"out"` if the units are its output channels (a producer), `"in"` if its input channels (the consumer).
        width: channels of one unit in this layer; grouped-query attention has different widths in q, k and v.
    """

    module: str
    axis: Axis
    width: int

    def channels(self, keep: Tensor) -> Tensor:
        """Indices of the channels of the kept units: `keep` bool [units] -> int64 [kept * width]."""
        return keep.repeat_interleave(self.width).nonzero().squeeze(1)


@dataclass(frozen=True)
class Site:
    """A consumer layer whose input channels can be removed in units, with the producers that lose them too.

    Attributes:
        name: `"heads.3"` or `"neurons.3"`: kind and layer; the same for every head class of a model.
        units: how many units there are now (heads, groups of heads that share a key and value head, or neurons).
        producers: layers whose output channels belong to the units.
        consumer: the layer whose input channels belong to the units.
        block: full name of the transformer block that holds the site; all other names are relative to it.
        residual: module and the index of the positional argument of its forward that is the residual stream the
            consumer's output is added to.
        mixer: module whose output may be replayed, if there is one (see `SitePattern`).
        counts: attribute paths of integers in proportion to the number of units, corrected when slimming.
        query_heads: query heads per unit (1 for neurons and for attention without groups).
        parameters: parameters that go away with one unit.
        out: output channels of the consumer.
    """

    name: str
    kind: Kind
    layer: int
    units: int
    producers: tuple[Edge, ...]
    consumer: Edge
    block: str
    residual: tuple[str, int]
    mixer: str | None
    counts: tuple[str, ...]
    query_heads: int
    parameters: int
    out: int

    @property
    def module(self) -> str:
        """Full name of the consumer inside the model."""
        return f"{self.block}.{self.consumer.module}"

    @property
    def droppable(self) -> bool:
        """Whether all units may go: attention without heads gets a stand-in for its mixer, so the mixer must be known."""
        return self.kind != "heads" or self.mixer is not None


@dataclass(frozen=True)
class Layout:
    """All sites of one model, in the order in which data passes them.

    Attributes:
        sites: those that have units; a sub-layer that was dropped is no site any more.
        dropped: names of the others (`"heads.3"`).
        blocks: full names of the transformer blocks, in order.
        parameters: parameters in all blocks together (the base that budgets refer to).
        uncovered: linear layers inside the blocks that belong to no site, so are never cut.
    """

    sites: tuple[Site, ...]
    blocks: tuple[str, ...]
    parameters: int
    uncovered: tuple[str, ...]
    dropped: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Site:
        return next(site for site in self.sites if site.name == name)

    def of_kind(self, kind: str) -> tuple[Site, ...]:
        """The sites of one kind, by layer."""
        return tuple(site for site in self.sites if site.kind == kind)

    def of_block(self, block: str) -> tuple[Site, ...]:
        """The sites of one block, in the order of the data."""
        return tuple(site for site in self.sites if site.block == block)

    def kept_parameters(self, kept: Mapping[str, int]) -> int:
        """Parameters left in the blocks when `kept` units remain per site name."""
        return self.parameters - sum(site.parameters * (site.units - kept[site.name]) for site in self.sites)


def site_name(kind: str, layer: int) -> str:
    """What the site of a kind and layer is called."""
    return f"{kind}.{layer}"


def dropped_note(layout: Layout) -> str:
    """For errors about a name that is not there: what was there once."""
    return f"; dropped earlier: {', '.join(layout.dropped)}" if layout.dropped else ""


def linear(block: nn.Module, edge: Edge) -> nn.Linear:
    """The layer of an edge inside its block."""
    layer = block.get_submodule(edge.module)
    assert isinstance(layer, nn.Linear), edge.module
    return layer
