"""Block by block and site by site through the dense and the pruned model side by side: what can be seen on the way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import liar
from liar import slim
from liar.batches import Calibration
from liar.capture import Call, Point, block_calls, run, watching
from liar.families import base_and_prefix, discover
from liar.sites import Site, linear
from liar.streams import residual
from rivals.site_data import Need

Rows = dict[str, Tensor]


@dataclass
class Walk:
    """A pruned copy of every block beside the dense one. Nothing of the model changes before `finish`."""

    model: nn.Module
    mask: liar.Mask
    calibration: Calibration
    needs: frozenset[Need]

    def __post_init__(self) -> None:
        self.layout = discover(self.model)
        self.mask = liar.Mask.of(self.mask, self.layout)
        self.blocks = [self.model.get_submodule(name) for name in self.layout.blocks]
        base, _ = base_and_prefix(self.model)
        self.dense, self.calls = block_calls(base, self.blocks, self.calibration.batches)
        self.pruned = list(self.dense)
        self.changed = False

    def dense_rows(self, number: int) -> dict[str, Rows]:
        """What every site of a block reads and leaves in the dense model; moves the dense stream on."""
        block = self.blocks[number]
        found: dict[str, list[Rows]] = {site.name: [] for site in self.sites(number)}
        if self.needs & {"dense_inputs", "dense_sum"}:
            points = {f"{site.name} {end}": point for site in self.sites(number) for end, point in self._ends(block, site)}
            for i, call in enumerate(self.calls[number]):
                with watching(points) as seen:
                    self.dense[i] = run(block, self.dense[i], call)
                for name, batches in found.items():
                    batches.append(self._dense_row(seen, name, i))
        return {name: joined(batches) for name, batches in found.items()}

    def _dense_row(self, seen: Rows, name: str, i: int) -> Rows:
        row = {}
        if "dense_inputs" in self.needs:
            row["dense_inputs"] = self.tokens(seen[f"{name} in"], i)
        if "dense_sum" in self.needs:
            row["dense_sum"] = self.tokens(seen[f"{name} residual"] + seen[f"{name} out"], i)
        return row

    def _ends(self, block: nn.Module, site: Site) -> Iterable[tuple[str, Point]]:
        consumer = linear(block, site.consumer)
        if "dense_inputs" in self.needs:
            yield "in", Point(consumer, 0)
        if "dense_sum" in self.needs:
            yield "out", Point(consumer, None)
            yield "residual", residual(block, site)

    def pruned_rows(self, number: int, student: nn.Module, site: Site, name: Need) -> Rows:
        """What a site reads in the pruned copy as it is now (`name` says what that is), and the stream beside it."""
        points: dict[str, Point] = {name: Point(linear(student, site.consumer), 0), "residual": residual(student, site)}
        found: list[Rows] = []
        for i, call in enumerate(self.calls[number]):
            with watching(points, stop_after=2) as seen:
                run(student, self.pruned[i], call)
            found.append({end: self.tokens(seen[end], i) for end in points if end in self.needs})
        return joined(found)

    def advance(self, number: int, student: nn.Module) -> None:
        """Move the pruned stream past a block whose copy is done."""
        if self.needs & {"inputs", "kept_inputs", "residual"} and number < len(self.blocks) - 1:
            calls: Sequence[Call] = self.calls[number]
            self.pruned = [run(student, hidden, call) for hidden, call in zip(self.pruned, calls, strict=True)]

    def sites(self, number: int) -> tuple[Site, ...]:
        """The sites of a block, in the order of the data."""
        return self.layout.of_block(self.layout.blocks[number])

    def tokens(self, value: Tensor, i: int) -> Tensor:
        """The kept tokens of batch i: [sequences, length, channels] -> [tokens, channels]."""
        return value[self.calibration.keep[i]]

    def finish(self, students: Sequence[nn.Module]) -> None:
        """Give the model the layers of its pruned copy."""
        for block, student in zip(self.blocks, students, strict=True):
            slim.adopt(block, student)
        slim.note_sizes(self.model)


def joined(found: Sequence[Rows]) -> Rows:
    """Batches of rows put together, by name."""
    return {name: torch.cat([rows[name] for rows in found]) for name in (found[0] if found else ())}
