"""One reconstruction under way: its options, and a report for every site that is done."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import nan
from typing import Any

from liar.data import FOLDS
from liar.errors import at_site
from liar.options import ReconstructOptions
from liar.repair.state import SiteState
from liar.report import SiteReport
from liar.solve import Solution, fit
from liar.statistics import Factor, Folds, Moments
from liar.verdicts import Verdict


@dataclass
class RepairContext:
    """What the steps of one reconstruction share.

    Attributes:
        options: how to reconstruct.
        advance: called after every site.
        reports: of the sites that are done, in order.
    """

    options: ReconstructOptions
    advance: Callable[[], Any]
    reports: list[SiteReport] = field(default_factory=list)

    def new_folds(self) -> Folds:
        """Empty statistics for one site."""
        return Folds(FOLDS, Factor if self.options.solver == "lstsq" else Moments)

    def fit_consumer(self, site: SiteState, folds: Folds) -> None:
        """Solve a site, write the answer into its consumer, and report it."""
        began = time.perf_counter()
        consumer = site.consumer
        creates = self.options.bias == "create" and consumer.bias is None
        with site.walk.timed("solve"), at_site(site.name, site.site.module):
            affine = creates or consumer.bias is not None
            all_data, splits = folds.all_data(affine=affine), folds.splits(affine=affine, channels=consumer.size("in"))
            options = self.options
            solution = fit(all_data, splits, *consumer.initial_weights(), ridge=options.ridge, solver=options.solver)
            consumer.write(solution.weight, solution.bias, create_bias=creates)
        self._report(site, solution, time.perf_counter() - began, bias_created=creates)

    def leave(self, site: SiteState) -> None:
        """Report a site at which nothing is done."""
        self._report(site, None, 0.0, bias_created=False)

    def _report(self, site: SiteState, solution: Solution | None, seconds: float, *, bias_created: bool) -> None:
        self.reports.append(
            SiteReport(
                site=site.name,
                module=site.site.module,
                kept=int(site.unit_mask.sum()),
                total=site.site.units,
                before=solution.before if solution else 0.0,
                after=solution.after if solution else 0.0,
                verdict=solution.verdict if solution else Verdict.UNTOUCHED,
                ridge=solution.ridge if solution else nan,
                condition=solution.condition if solution else nan,
                seconds=seconds,
                bias_created=bias_created,
            )
        )
        self.advance()
