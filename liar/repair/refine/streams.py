"""The teacher's and the student's hidden states before the blocks of a window, and the activations inside of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from liar.data import Calibration
from liar.models import Layout, Site, base_and_prefix, compute_device, plain_block
from liar.repair.captures import capture_points, read_captures
from liar.repair.refine.plan import Window
from liar.runtime import (
    ActivationStore,
    BlockCall,
    Point,
    calls_of,
    capture_activations,
    map_tensors,
    record_block_calls,
    replay_output,
    run_block,
    widen,
)
from liar.surgery import copy_block


class Side:
    """One of the two models: its blocks, and where its hidden states are.

    Args:
        model: the teacher or the student.
        layout: its sites.
        stream: name of its hidden states in the store.
        store: holds them, and how blocks are called.
        copies: whether blocks are trained, so that they are copies with values of their own, of at least float32.
    """

    def __init__(self, model: nn.Module, layout: Layout, stream: str, store: ActivationStore, *, copies: bool) -> None:
        self.model, self.layout, self.stream, self.store, self.copies = model, layout, stream, store, copies
        self._blocks: dict[int, nn.Module] = {}

    def enter(self, calibration: Calibration) -> None:
        """Store what enters the first block, and how all blocks are called."""
        base, _ = base_and_prefix(self.model)
        blocks = [self.model.get_submodule(name) for name in self.layout.blocks]
        record_block_calls(base, blocks, calibration.batches, self.store, self.stream, numbers=calibration.numbers)

    def block(self, number: int) -> nn.Module:
        """A block, as it is or to be trained; a copy lasts until `drop`."""
        if number not in self._blocks:
            block = plain_block(self.model.get_submodule(self.layout.blocks[number]), compute_device(self.model))
            self._blocks[number] = _trainable_copy(block) if self.copies else block
        return self._blocks[number]

    def drop(self, before: int) -> None:
        """Forget the copies of the blocks before a number, and how these are called."""
        for number in range(before):
            self._blocks.pop(number, None)
            self.store.discard(calls_of(self.stream, number))

    def sites(self, number: int) -> tuple[Site, ...]:
        """The sites of a block."""
        return self.layout.of_block(self.layout.blocks[number])

    def run(self, blocks: range, batch: int, hidden: Tensor) -> Tensor:
        """The hidden states after some blocks."""
        for number in blocks:
            hidden = self._run(number, batch, hidden)
        return hidden

    def advance(self, blocks: range, batches: range) -> None:
        """Move the hidden states past some blocks."""
        for batch in batches:
            self.store.put(self.stream, batch, self.run(blocks, batch, self.store.get(self.stream, batch)))

    def run_site(self, window: Window, batch: int, hidden: Tensor, replayed: Sequence[Tensor] = ()) -> Tensor:
        """The residual stream after the site of a window; what earlier sites add to it may be replayed."""
        block, sites = self.block(window.start), self.sites(window.start)
        assert window.site is not None
        site = sites[window.site]
        with (
            capture_activations(capture_points(block, site, ["stream"]), stop=True) as activations,
            _replaying(block, sites, replayed),
        ):
            self._run(window.start, batch, hidden)
        # Of the mask only the shape counts.
        return read_captures(activations, block, site, ["stream"], torch.ones(hidden.shape[:2]))["stream"]

    def added(self, window: Window, batch: int, hidden: Tensor) -> list[Tensor]:
        """What the sites before that of a window add to the residual stream."""
        assert window.site is not None
        block, earlier = self.block(window.start), self.sites(window.start)[: window.site]
        points = {site.name: Point(block.get_submodule(site.added), None) for site in earlier}
        activations = self._captured(window, batch, hidden, points) if points else {}
        return [activations[site.name] for site in earlier]

    def matrix(self, window: Window, batch: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What the layer of a window reads and gives."""
        module = self.layer(window)
        points = {"reads": Point(module, 0), "gives": Point(module, None)}
        activations = self._captured(window, batch, hidden, points)
        return activations["reads"], activations["gives"]

    def layer(self, window: Window) -> Any:
        """The layer of a window of one matrix."""
        assert window.matrix is not None
        return self.block(window.start).get_submodule(window.matrix)

    def _captured(self, window: Window, batch: int, hidden: Tensor, points: Mapping[str, Point]) -> dict[str, Tensor]:
        with capture_activations(points, stop=True) as activations:
            self._run(window.start, batch, hidden)
        return activations

    def _run(self, number: int, batch: int, hidden: Tensor) -> Tensor:
        """Run a block in the type of its own weights, which may be another than that of the stream."""
        block = self.block(number)
        dtype = next(block.parameters()).dtype
        call: BlockCall = self.store.get(calls_of(self.stream, number), batch)
        if self.copies:
            call = map_tensors(call, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
        return run_block(block, hidden.to(dtype), call)


def _trainable_copy(block: nn.Module) -> nn.Module:
    """A copy with values of its own, of at least float32: updates are too small for 16 bits."""
    own = copy_block(block)
    for module in own.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            # Whatever is not trained stays the user's own.
            setattr(module, name, nn.Parameter(widen(parameter.detach()).clone(), requires_grad=False))
    return own


@contextmanager
def _replaying(block: nn.Module, sites: Sequence[Site], outputs: Sequence[Tensor]) -> Iterator[None]:
    """Let the first sites of a block add known values to the residual stream."""
    with ExitStack() as stack:
        for site, output in zip(sites, outputs, strict=False):
            added = block.get_submodule(site.added)
            stack.enter_context(replay_output(added, output.to(next(block.parameters()).dtype)))
        yield
