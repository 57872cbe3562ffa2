"""Which layers are trained together: the windows of a granularity, in the order of the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from liar.errors import OptionError
from liar.models import LayerView, Layout, Site


@dataclass(frozen=True)
class Window:
    """What is trained together.

    Attributes:
        name: `"heads.3"`, `"self_attn.q_proj.3"`, `"block.3"`, or `"window.3"`: what, and the first block of it.
        module: full name of what its error is measured at.
        start: number of the first block.
        stop: number of the block after the last.
        layers: what is trained: (number of the block, name of the layer inside it).
        site: place of its site in the block; None where whole blocks are trained.
        matrix: name of its layer inside the block, where it is a single one.
    """

    name: str
    module: str
    start: int
    stop: int
    layers: tuple[tuple[int, str], ...]
    site: int | None = None
    matrix: str | None = None

    @property
    def blocks(self) -> range:
        """Numbers of the blocks."""
        return range(self.start, self.stop)


def windows_of(model: nn.Module, layout: Layout, teacher: nn.Module, dense: Layout, granularity: int | str) -> list[Window]:
    """The windows of a model.

    Windows of n > 1 blocks share one block with the next window; the last may be shorter. A matrix has a window only where its
    output is as wide as the teacher's: there is nothing to fit a layer to that lost outputs.

    Args:
        model: that is trained.
        layout: its sites.
        teacher: the dense model.
        dense: its sites.
        granularity: as in `RefineOptions`.

    Raises:
        OptionError: a window would have more blocks than the model.
    """
    if granularity == "sublayer":
        return [
            Window(site.name, site.module, number, number + 1, _layers([site], number), site=place)
            for number, block in enumerate(layout.blocks)
            for place, site in enumerate(layout.of_block(block))
        ]
    if granularity == "matrix":
        return [
            Window(f"{name}.{number}", f"{block}.{name}", number, number + 1, ((number, name),), site=place, matrix=name)
            for number, (block, other) in enumerate(zip(layout.blocks, dense.blocks, strict=True))
            for name, place in _places(layout.of_block(block)).items()
            if _outputs(model, f"{block}.{name}") == _outputs(teacher, f"{other}.{name}")
        ]
    return _spans(layout, 1 if granularity == "block" else int(granularity))


def _spans(layout: Layout, length: int) -> list[Window]:
    """Windows of so many blocks."""
    blocks = layout.blocks
    if length > len(blocks):
        raise OptionError(f"granularity={length}: the model has {len(blocks)} blocks: expected at most as many")
    result: list[Window] = []
    start = 0
    while not result or result[-1].stop < len(blocks):
        stop = min(start + length, len(blocks))
        layers = [layer for number in range(start, stop) for layer in _layers(layout.of_block(blocks[number]), number)]
        name = f"block.{start}" if length == 1 else f"window.{start}"
        result.append(Window(name, blocks[stop - 1], start, stop, tuple(layers)))
        start += max(1, length - 1)
    return result


def _layers(sites: Sequence[Site], number: int) -> tuple[tuple[int, str], ...]:
    """The layers of some sites of one block."""
    return tuple((number, name) for name in _places(sites))


def _places(sites: Sequence[Site]) -> dict[str, int]:
    """The layers of some sites, each once, with the place of the first site that they belong to."""
    places: dict[str, int] = {}
    for place, site in enumerate(sites):
        for name in (*site.inputs, site.consumer.module):
            places.setdefault(name, place)
    return places


def _outputs(model: nn.Module, name: str) -> int:
    return LayerView.of(model.get_submodule(name), name).size("out")
