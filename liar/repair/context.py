"""One reconstruction under way: its options, and a report for every site that is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from math import nan
from typing import Any

from liar.data import FOLDS
from liar.errors import at_site
from liar.options import ReconstructOptions
from liar.repair.state import SiteState
from liar.report import SiteReport
from liar.runtime import distributed
from liar.solve import MIDDLE, RIDGES, Solution, fit, fit_damped
from liar.statistics import Factor, Folds, Moments
from liar.verdicts import Verdict

FEWEST_TOKENS = 64
TOKENS_PER_CHANNEL = 2
# Kinds of sites whose layers run with all their units on the pruned stream, for the damped target.
WHOLE = frozenset({"neurons"})


@dataclass
class RepairContext:
    """What the steps of one reconstruction share.

    Attributes:
        options: how to reconstruct.
        advance: called after every site.
        reports: of the sites that are done, in order.
        starts: by kind of site, the ridge that was chosen last.

    Example:
        >>> from liar.options import ReconstructOptions
        >>> from liar.repair import RepairContext
        >>> RepairContext(ReconstructOptions(ridge=0.1), advance=lambda: None).reports
        []
    """

    options: ReconstructOptions
    advance: Callable[[], Any]
    reports: list[SiteReport] = field(default_factory=list)
    starts: dict[str, float] = field(default_factory=dict)

    def new_folds(self, site: SiteState, share: float = 1) -> Folds:
        """Empty statistics for one site, of all its tokens or about such a share of them."""
        origins = site.walk.sample(site.site.stack, share).origins
        return Folds(FOLDS, Factor if self.options.solver == "lstsq" else Moments, origins)

    def runs_whole(self, site: SiteState) -> bool:
        """Whether the site's layer runs whole on the pruned stream; beside a teacher, it may be cut already."""
        return self.options.target == "damped_stream" and site.site.kind in WHOLE and not site.walk.has_teacher

    def is_enough(self, site: SiteState, channels: int) -> bool:
        """Whether there is enough text, copies counted once, to change layers with so many input channels by it.

        A few dozen tokens show an error too roughly. Where a block normalises its sums (BERT), more is needed: with less than
        about two tokens for every channel all answers are drawn to the mean, so that the held-out error of the layer falls
        while the model's output gets worse. Where it does not (LLaMA), fewer help too (benchmarks/README.md, "Few tokens").
        """
        per_channel = 0 if site.walk.layout.is_pre_norm else TOKENS_PER_CHANNEL
        return site.calibration.distinct_tokens >= max(FEWEST_TOKENS, per_channel * channels)

    def fit_consumer(self, site: SiteState, folds: Folds, *, damped: bool = False) -> None:
        """Solve a site in one process, from the rows of all, write the answer into its consumer, and report it.

        Where it is damped, the statistics have a `damped_target`.
        """
        self.reduce(site, folds)
        self.finish(site, *distributed.answer(partial(self.solve, site, folds, damped=damped)))

    def reduce(self, site: SiteState, folds: Folds) -> None:
        """Add the rows of all processes to the statistics of a site."""
        with site.walk.timed("statistics"), at_site(site.name, site.site.module):
            folds.reduce(distributed)

    def solve(self, site: SiteState, folds: Folds, *, damped: bool = False) -> tuple[Solution, float]:
        """The answer for a site, and how many seconds it took."""
        began = time.perf_counter()
        consumer, options = site.consumer, self.options
        with site.walk.timed("solve"), at_site(site.name, site.site.module):
            affine = self._creates_bias(site) or consumer.bias is not None
            all_data, splits = folds.normals(affine=affine, channels=consumer.size("in"))
            enough = self.is_enough(site, consumer.size("in"))
            initial = consumer.initial_weights()
            # Ridges of the same part of neighbouring blocks are alike, so the search is short from there.
            start = self.starts.get(site.site.kind, MIDDLE)
            solution = (fit_damped if damped else fit)(
                all_data, splits, *initial, ridge=options.ridge, solver=options.solver, enough=enough, start=start
            )
        return solution, time.perf_counter() - began

    def finish(self, site: SiteState, solution: Solution, seconds: float) -> None:
        """Write an answer into the consumer of its site, and report it."""
        creates = self._creates_bias(site)
        if solution.ridge in RIDGES:
            self.starts[site.site.kind] = solution.ridge
        site.consumer.write(solution.weight, solution.bias, create_bias=creates)
        self._report(site, solution, seconds, bias_created=creates)

    def _creates_bias(self, site: SiteState) -> bool:
        return self.options.bias == "create" and site.consumer.bias is None

    def finished(self, sites: Sequence[str]) -> dict[str, Any]:
        """The reports of some sites, and where the next searches begin; see `RepairStep.finished`."""
        return {"reports": [asdict(report) for report in self.reports if report.site in sites], "starts": self.starts}

    def restore(self, content: Mapping[str, Any]) -> None:
        """Take what `finished` gave in an earlier run."""
        self.starts = dict(content["starts"])
        for report in content["reports"]:
            self.reports.append(SiteReport(**{**report, "verdict": Verdict(report["verdict"])}))
            self.advance()

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
