"""One reconstruction under way: what was asked, what has happened so far, and the repair of one site from its statistics."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from math import nan
from typing import Any

import torch
from torch import nn

from liar.batches import FOLDS, Calibration
from liar.capture import Call
from liar.errors import Verdict, at_site
from liar.fold import fold, start
from liar.mask import Mask
from liar.report import SiteReport
from liar.sites import Site, linear
from liar.solve import Solution, fit, fit_drift
from liar.statistics import Factor, Folds, Moments, Rows

BIASES = ("keep", "create")


@dataclass(frozen=True)
class Options:
    """How to reconstruct; the meaning of each is told in `liar.reconstruct`."""

    target: str
    ridge: float | str
    refit: bool
    solver: str
    bias: str


@dataclass(frozen=True)
class Pair:
    """A dense block beside its slim copy, with how the model calls it for every batch."""

    block: nn.Module
    student: nn.Module
    sites: tuple[Site, ...]
    calls: Sequence[Call]


@dataclass
class Job:
    """One reconstruction under way; `reports` and `clock` (seconds by stage) fill up.

    `advance` is called after every site. `changed` says whether the pruned stream differs from the dense one by now.
    """

    mask: Mask
    calibration: Calibration
    options: Options
    advance: Callable[[], Any]
    reports: list[SiteReport] = field(default_factory=list)
    clock: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    changed: bool = False

    @cached_property
    def rows(self) -> list[Rows]:
        """For every batch, the rows of the statistics."""
        return [Rows.of(*batch, FOLDS) for batch in zip(self.calibration.keep, self.calibration.folds, strict=True)]

    def folds(self) -> Folds:
        """Empty statistics for one site."""
        return Folds(FOLDS, Factor if self.options.solver == "lstsq" else Moments)

    def repair_producers(self, pair: Pair, site: Site, folds: Folds) -> None:
        """Fit the producers to what they give in the dense model, from rows of (what they read now, what they read there).

        They are linear, so one regression of the old input on the new one serves them all.
        """
        with self.timed("solve"), at_site(site.name, site.module):
            layers = [linear(pair.student, edge) for edge in site.producers]
            weights, biases = (torch.cat(parts, -1) for parts in zip(*map(start, layers), strict=True))
            affine = all(layer.bias is not None for layer in layers)
            whole, splits = folds.whole(affine=affine), folds.splits(affine=affine, channels=len(weights))
            weights, biases = fit_drift(whole, splits, weights, biases, ridge=self.options.ridge, solver=self.options.solver)
            widths = [layer.out_features for layer in layers]
            parts = torch.split(weights, widths, 1), torch.split(biases, widths)
            for layer, weight, bias in zip(layers, *parts, strict=True):
                fold(layer, weight, bias)

    def repair_consumer(self, pair: Pair, site: Site, folds: Folds | None) -> None:
        """Solve a site and fold the answer into the slim copy; None if there is nothing to repair."""
        began = time.perf_counter()
        consumer = linear(pair.student, site.consumer)
        creates = folds is not None and self.options.bias == "create" and consumer.bias is None
        solution = None
        if folds is not None:
            with self.timed("solve"), at_site(site.name, site.module):
                affine = creates or consumer.bias is not None
                whole, splits = folds.whole(affine=affine), folds.splits(affine=affine, channels=consumer.in_features)
                solution = fit(whole, splits, *start(consumer), ridge=self.options.ridge, solver=self.options.solver)
                fold(consumer, solution.weight, solution.bias, create_bias=creates)
        self.reports.append(self._reported(site, solution, time.perf_counter() - began, creates))
        self.advance()

    def _reported(self, site: Site, solution: Solution | None, seconds: float, bias_created: bool) -> SiteReport:
        return SiteReport(
            site=site.name,
            module=site.module,
            kept=self.mask.kept(site.name),
            total=site.units,
            before=solution.before if solution else 0.0,
            after=solution.after if solution else 0.0,
            verdict=solution.verdict if solution else Verdict.UNTOUCHED,
            ridge=solution.ridge if solution else nan,
            condition=solution.condition if solution else nan,
            seconds=seconds,
            bias_created=bias_created,
        )

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time of the body to the clock."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.clock[stage] += time.perf_counter() - began
