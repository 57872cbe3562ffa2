"""The walk through the model: block by block, statistics, solve and fold, with the dense and the pruned stream side by side.

Memory beside the model and its slim copy: the hidden states of the two streams (and the targets of one block), and the
statistics of one block.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import nan
from typing import Any

import torch
from torch import Tensor, nn

from liar import slim
from liar.calibration import FOLDS, Calibration
from liar.capture import Call, Point, block_calls, run, watching
from liar.errors import CalibrationError, Verdict
from liar.families import base_and_prefix
from liar.fold import fold, start
from liar.mask import Mask
from liar.report import SiteReport
from liar.sites import Layout, Site, linear
from liar.solve import fit
from liar.statistics import Factor, Folds, Moments

TARGETS = ("dense_stream", "same_input")
BIASES = ("keep", "create")


@dataclass(frozen=True)
class Options:
    """How to reconstruct; the meaning of each is told in `liar.reconstruct`."""

    target: str
    ridge: float | str
    solver: str
    bias: str


@dataclass(frozen=True)
class _Pair:
    """A dense block beside its slim copy."""

    block: nn.Module
    student: nn.Module
    sites: tuple[Site, ...]
    calls: Sequence[Call]


@dataclass
class Rebuild:
    """One reconstruction under way: it makes slim copies of all blocks and leaves the model itself alone.

    `reports` and `clock` (seconds by stage) fill up while `run` walks.
    """

    model: nn.Module
    layout: Layout
    mask: Mask
    calibration: Calibration
    options: Options
    advance: Callable[[], Any]
    reports: list[SiteReport] = field(default_factory=list)
    clock: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    _changed: bool = False

    def run(self) -> list[nn.Module]:
        """The slim copy of every block, in order."""
        base, _ = base_and_prefix(self.model)
        blocks = [self.model.get_submodule(name) for name in self.layout.blocks]
        with self._timed("enter"):
            dense, calls = block_calls(base, blocks, self.calibration.batches)
        # Without a pruned stream nothing may keep what entered the first block alive.
        pruned: list[Tensor] = list(dense) if self.options.target == "dense_stream" else []
        students: list[nn.Module] = []
        for number, (name, block) in enumerate(zip(self.layout.blocks, blocks, strict=True)):
            pair = _Pair(block, slim.student(block), self.layout.of_block(name), calls[number])
            for site in pair.sites:
                slim.cut_site(pair.student, site, self.mask[site.name])
            if self.options.target == "same_input":
                self._on_dense_stream(pair, dense)
            else:
                self._on_pruned_stream(pair, dense, pruned, last=number == len(blocks) - 1)
            students.append(pair.student)
        return students

    def _on_dense_stream(self, pair: _Pair, dense: list[Tensor]) -> None:
        """Each site from what its consumer reads and writes in the dense model; all sites of a block in one pass."""
        sites = [site for site in pair.sites if not self.mask.whole(site.name)]
        folds = {site.name: self._folds() for site in sites}
        channels = {site.name: site.consumer.channels(self.mask[site.name]).to(dense[0].device) for site in sites}
        points: dict[str, Point] = {}
        for site in sites:
            consumer = linear(pair.block, site.consumer)
            points |= {f"{site.name} in": Point(consumer, 0), f"{site.name} out": Point(consumer, None)}
        for number, call in enumerate(pair.calls):
            with self._timed("dense forward"), watching(points) as seen:
                dense[number] = run(pair.block, dense[number], call)
            with self._timed("statistics"):
                for site in sites:
                    z, t = (self._rows(seen[f"{site.name} {end}"], number) for end in ("in", "out"))
                    folds[site.name].update(z.index_select(1, channels[site.name]), t, self.calibration.folds[number])
        for site in pair.sites:
            self._finish(pair, site, folds.get(site.name))

    def _on_pruned_stream(self, pair: _Pair, dense: list[Tensor], pruned: list[Tensor], *, last: bool) -> None:
        """Site after site, from what the slim copy reads, so that every site repairs what those before it left."""
        sums = self._dense_sums(pair, dense)
        for site in pair.sites:
            if self.mask.whole(site.name) and not self._changed:
                self._finish(pair, site, None)
                continue
            self._changed = True
            folds = self._folds()
            consumer = linear(pair.student, site.consumer)
            points = {"z": Point(consumer, 0), "residual": _residual(pair.student, site)}
            for number, call in enumerate(pair.calls):
                with self._timed("pruned forward"), watching(points, stop_after=2) as seen:
                    run(pair.student, pruned[number], call)
                with self._timed("statistics"):
                    target = _wide(self._rows(sums[site.name][number], number))
                    target = target - _wide(self._rows(seen["residual"], number))
                    folds.update(self._rows(seen["z"], number), target, self.calibration.folds[number])
            del sums[site.name]
            self._finish(pair, site, folds)
        for number, call in enumerate(pair.calls if not last else ()):
            with self._timed("pruned forward"):
                pruned[number] = run(pair.student, pruned[number], call) if self._changed else dense[number]

    def _dense_sums(self, pair: _Pair, dense: list[Tensor]) -> dict[str, list[Tensor]]:
        """What the residual stream should become after each site, [sequences, length, out] per batch; moves the stream on.

        Where a block hands on its last sum as it is (pre-norm), that sum is the dense stream itself and takes no memory.
        """
        points: dict[str, Point] = {}
        for site in pair.sites:
            consumer = linear(pair.block, site.consumer)
            points |= {f"{site.name} out": Point(consumer, None), f"{site.name} residual": _residual(pair.block, site)}
        sums: dict[str, list[Tensor]] = {site.name: [] for site in pair.sites}
        for number, call in enumerate(pair.calls):
            with self._timed("dense forward"):
                with watching(points) as seen:
                    dense[number] = run(pair.block, dense[number], call)
                for name, batches in sums.items():
                    total = seen[f"{name} residual"] + seen[f"{name} out"]
                    batches.append(dense[number] if torch.equal(total, dense[number]) else total)
        return sums

    def _finish(self, pair: _Pair, site: Site, folds: Folds | None) -> None:
        """Solve a site and fold the answer into the slim copy; None if there is nothing to repair."""
        began = time.perf_counter()
        consumer = linear(pair.student, site.consumer)
        creates = folds is not None and self.options.bias == "create" and "bias" not in dict(consumer.named_parameters())
        found: dict[str, Any] = {
            "before": 0.0, "after": 0.0, "verdict": Verdict.UNTOUCHED, "ridge": nan, "condition": nan,
        }  # fmt: skip
        if folds is not None:
            affine = creates or consumer.bias is not None
            try:
                whole, splits = folds.whole(affine=affine), folds.splits(affine=affine, channels=consumer.in_features)
            except CalibrationError as error:
                raise CalibrationError(f"{site.name} ({site.module}): {error}") from error
            solution = fit(whole, splits, *start(consumer), ridge=self.options.ridge, solver=self.options.solver)
            fold(consumer, solution, create_bias=creates)
            found = {name: getattr(solution, name) for name in found}
        seconds = time.perf_counter() - began
        self.clock["solve"] += seconds
        self.reports.append(
            SiteReport(
                site=site.name,
                module=site.module,
                kept=self.mask.kept(site.name),
                total=site.units,
                seconds=seconds,
                bias_created=creates,
                **found,
            )
        )
        self.advance()

    def _folds(self) -> Folds:
        return Folds(FOLDS, Factor if self.options.solver == "lstsq" else Moments)

    def _rows(self, value: Tensor, number: int) -> Tensor:
        """The kept tokens of a batch: [sequences, length, channels] -> [tokens, channels]."""
        return value[self.calibration.keep[number]]

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.clock[stage] += time.perf_counter() - began


def _wide(value: Tensor) -> Tensor:
    """Differences of streams are small: 16-bit streams are subtracted in float32."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _residual(block: nn.Module, site: Site) -> Point:
    module, argument = site.residual
    return Point(block.get_submodule(module), argument)
