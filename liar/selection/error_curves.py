"""Error curves: what the model's output loses with every unit that goes, if the rest is reconstructed as well as can be."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from liar.data import Calibration, sample
from liar.errors import at_site
from liar.models import Layout
from liar.progress import Progress, timed
from liar.repair import RepairStep, SiteState, walk_blocks
from liar.runtime import IN_PLACE, Workspace, distributed, sequence_sums, widen
from liar.selection.elimination import Elimination, eliminate
from liar.selection.fisher import Sensitivities, Sensitivity, sensitivities
from liar.statistics import Moments

# Relative; the reconstruction chooses its own ridge per site, here one has to do for all numbers of units.
RIDGE = 1e-3
# Rows that the moments are taken from, and for each channel, where there are more: a sample of the data is enough.
TOKENS = 32_768
ROWS = 20
# Share of a sensitivity that is spread over all directions at least: it is measured where the model is still whole.
EVEN = 0.2


def error_curves(
    model: nn.Module, layout: Layout, calibration: Calibration, progress: Progress, workspace: Workspace = IN_PLACE
) -> dict[str, dict[str, Tensor]]:
    """By site: `order` and `increases` of an `Elimination`.

    A step is what the reconstruction of the site misses then, weighted by how much that moves the model's output (see
    `Sensitivity`); so curves of all sites are in one unit, that of twice a Kullback-Leibler divergence per output.

    Raises:
        CalibrationError: NaN or Inf in the activations of a site, which it names.
        ModelError: parameters that gradients cannot be taken of.
    """
    sensitivity = _known_sensitivities(layout, workspace)
    if sensitivity is None:
        sensitivity = sensitivities(model, layout, calibration, progress, workspace.new_store())
        _commit(sensitivity, layout, workspace)
    widest = max(site.units * site.consumer.width for site in layout.sites)
    calibration = sample(calibration, max(TOKENS, ROWS * widest))
    clock: defaultdict[str, float] = defaultdict(float)
    with progress.stage("elimination", len(layout.sites)) as advance:
        curves = ErrorCurves(sensitivity, lambda: advance(1))
        walk_blocks(model, layout, calibration, [curves], workspace=workspace.within("elimination"), clock=clock)
        with timed(clock, "elimination"):
            curves.finish()
    for work, seconds in clock.items():
        progress.seconds[f"select: {work}"] += seconds
    return {name: {"order": curve.order, "increases": curve.increases} for name, curve in curves.result.items()}


def _entry(number: int) -> str:
    """The name of a site's entry in the journal: one for each, so that only one matrix is in memory at a time."""
    return f"sensitivity-{number:04d}"


def _known_sensitivities(layout: Layout, workspace: Workspace) -> Sensitivities | None:
    """Those that an earlier run has measured; None if it has not noted all of them."""
    found = Sensitivities(workspace.new_store())
    for number, site in enumerate(layout.sites):
        known = workspace.read(_entry(number))
        if known is None:
            return None
        found[site.name] = Sensitivity(**known)
    return found


def _commit(measured: Sensitivities, layout: Layout, workspace: Workspace) -> None:
    for number, site in enumerate(layout.sites):
        workspace.commit(_entry(number), vars(measured[site.name]))


class ErrorCurves(RepairStep):
    """A step that changes nothing: moments of what each consumer reads, and the elimination of its units.

    Several processes eliminate at the same time: as many sites of one kind wait, one in each.
    """

    captures = frozenset({"consumer_input"})

    def __init__(self, sensitivity: Mapping[str, Sensitivity], advance: Callable[[], Any]) -> None:
        self.sensitivity, self.advance = sensitivity, advance
        self.moments: dict[str, Moments] = {}
        self.coherence: dict[str, float] = {}
        self.waiting: defaultdict[str, dict[str, Callable[[], Elimination] | None]] = defaultdict(dict)
        self.result: dict[str, Elimination] = {}

    def observe(self, site: SiteState, batch: int, dense: Mapping[str, Tensor]) -> None:
        """Add a batch to the moments."""
        with site.walk.timed("statistics"):
            token_mask = site.calibration.token_masks[batch]
            rows = widen(dense["consumer_input"][token_mask])
            if site.name not in self.moments:
                self.coherence[site.name] = self.sensitivity[site.name].coherence
                self.moments[site.name] = Moments(sum(site.walk.sample(site.site.stack).origins))
            rows = reweight_sequence_mean(rows, token_mask, self.coherence[site.name])
            self.moments[site.name].update(rows, rows[:, :0])

    def repair(self, site: SiteState) -> None:
        """Eliminate, in the unit of the sensitivities, as soon as there is a site for every process."""
        # A process without batches has seen nothing.
        moments, waiting = self.moments.pop(site.name, None) or Moments(), self.waiting[site.site.kind]
        with site.walk.timed("statistics"), at_site(site.name, site.site.module):
            moments.reduce(distributed)
        with site.walk.timed("elimination"):
            waiting[site.name] = self._prepared(site, moments) if distributed.has_turn(len(waiting)) else None
            if len(waiting) == distributed.size():
                self._eliminate(waiting)

    def finished(self, sites: Sequence[str]) -> dict[str, Any]:
        """The curves of the sites."""
        self.finish()
        return {f"{site}/{name}": value for site in sites for name, value in vars(self.result[site]).items()}

    def restore(self, sites: Sequence[str], content: Mapping[str, Any]) -> None:
        """Take the curves of an earlier run."""
        for site in sites:
            self.result[site] = Elimination(content[f"{site}/order"], content[f"{site}/increases"])
            self.advance()

    def finish(self) -> None:
        """Eliminate what still waits."""
        for waiting in self.waiting.values():
            self._eliminate(waiting)

    def _eliminate(self, waiting: dict[str, Callable[[], Elimination] | None]) -> None:
        for name, curve in zip(waiting, distributed.answers(list(waiting.values())), strict=True):
            self.result[name] = curve
            self.advance()
        waiting.clear()

    def _prepared(self, site: SiteState, moments: Moments) -> Callable[[], Elimination]:
        """The elimination of a site, with all that it needs of the model."""
        sensitivity, consumer = self.sensitivity[site.name], site.dense_consumer
        with at_site(site.name, site.site.module):
            gram = moments.normal(affine=consumer.bias is not None).gram
        mean, root = directions(sensitivity.fisher.to(gram), sensitivity.outputs)
        channels = site.site.consumer.by_unit(site.site.units).flatten().to(gram.device)
        weight = (consumer.matrix.double() @ root)[channels]
        scale = float(mean) / site.calibration.tokens
        return partial(_scaled_elimination, gram[channels][:, channels], weight, site.site.units, scale)


def _scaled_elimination(gram: Tensor, weight: Tensor, units: int, scale: float) -> Elimination:
    curve = eliminate(gram, weight, units, RIDGE)
    return replace(curve, increases=curve.increases * scale)


def reweight_sequence_mean(rows: Tensor, token_mask: Tensor, coherence: float) -> Tensor:
    """Rows in whose squares the mean over a sequence counts `coherence` times, and what differs from it once.

    Args:
        rows: [tokens, channels].
        token_mask: their positions, bool [sequences, length].
        coherence: see `Sensitivity`.
    """
    mean = sequence_sums(rows, token_mask) / token_mask.sum(1, keepdim=True).clamp_min(1)
    return rows + (sqrt(coherence) - 1) * mean[token_mask.nonzero()[:, 0]]


def directions(sensitivity: Tensor, outputs: int) -> tuple[Tensor, Tensor]:
    """(m, root) of a sensitivity F [out, out]: `m root root'` is F with a part of it spread evenly over all directions.

    The error of a reconstruction times the root has the squares that count; m is the mean of F's diagonal. Gradients of a few
    outputs are partly chance, so the fewer there were, the larger that part. Where nothing moves the output, m is 0 and all
    directions count alike.
    """
    mean = sensitivity.diagonal().mean()
    shape = sensitivity / mean if mean > 0 else sensitivity
    part = max(EVEN, shrinkage(shape, outputs))
    even = torch.eye(len(sensitivity)).to(sensitivity)
    return mean, torch.linalg.cholesky((1 - part) * shape + part * even)


def shrinkage(covariance: Tensor, samples: int) -> float:
    """Part of a covariance, seen in so many samples, to be replaced by its mean variance (OAS, Chen et al. 2010, eq. 23)."""
    size = len(covariance)
    even = covariance.diagonal().mean().square()
    second_moment = covariance.square().mean()
    spread = (samples + 1) * (second_moment - even / size)
    return float(((second_moment + even) / spread).clamp_max(1)) if spread > 0 else 1.0
