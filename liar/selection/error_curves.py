"""Error curves: what the model's output loses with every unit that goes, if the rest is reconstructed as well as can be."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from liar.data import Calibration, sample
from liar.errors import at_site
from liar.models import Layout
from liar.progress import Progress
from liar.repair import RepairStep, SiteState, walk_blocks
from liar.runtime import IN_PLACE, Workspace, sequence_sums, widen
from liar.selection.elimination import Elimination, eliminate
from liar.selection.fisher import Sensitivity, sensitivities
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
    sensitivity = _sensitivities(model, layout, calibration, progress, workspace)
    widest = max(site.units * site.consumer.width for site in layout.sites)
    calibration = sample(calibration, max(TOKENS, ROWS * widest))
    clock: defaultdict[str, float] = defaultdict(float)
    with progress.stage("elimination", len(layout.sites)) as advance:
        curves = ErrorCurves(sensitivity, lambda: advance(1))
        walk_blocks(model, layout, calibration, [curves], workspace=workspace.within("elimination"), clock=clock)
    for work, seconds in clock.items():
        progress.seconds[f"select: {work}"] += seconds
    return {name: {"order": curve.order, "increases": curve.increases} for name, curve in curves.result.items()}


def _sensitivities(
    model: nn.Module, layout: Layout, calibration: Calibration, progress: Progress, workspace: Workspace
) -> dict[str, Sensitivity]:
    """The sensitivities, or those that an earlier run has measured."""
    known = workspace.read("sensitivity")
    if known is not None:
        numbers = known.pop("numbers")
        return {name: Sensitivity(fisher, *numbers[name]) for name, fisher in known.items()}
    measured = sensitivities(model, layout, calibration, progress)
    numbers = {name: (each.coherence, each.outputs) for name, each in measured.items()}
    workspace.commit("sensitivity", {"numbers": numbers, **{name: each.fisher for name, each in measured.items()}})
    return measured


class ErrorCurves(RepairStep):
    """A step that changes nothing: moments of what each consumer reads, and the elimination of its units."""

    captures = frozenset({"consumer_input"})

    def __init__(self, sensitivity: Mapping[str, Sensitivity], advance: Callable[[], Any]) -> None:
        self.sensitivity, self.advance = sensitivity, advance
        self.moments: dict[str, Moments] = {}
        self.result: dict[str, Elimination] = {}

    def observe(self, site: SiteState, batch: int, dense: Mapping[str, Tensor]) -> None:
        """Add a batch to the moments."""
        with site.walk.timed("statistics"):
            token_mask = site.calibration.token_masks[batch]
            rows = widen(dense["consumer_input"][token_mask])
            rows = reweight_sequence_mean(rows, token_mask, self.sensitivity[site.name].coherence)
            self.moments.setdefault(site.name, Moments()).update(rows, rows[:, :0])

    def repair(self, site: SiteState) -> None:
        """Eliminate, in the unit of the sensitivities."""
        with site.walk.timed("elimination"), at_site(site.name, site.site.module):
            self.result[site.name] = self._curve(site)
        self.advance()

    def finished(self, sites: Sequence[str]) -> dict[str, Any]:
        """The curves of the sites."""
        return {f"{site}/{name}": value for site in sites for name, value in vars(self.result[site]).items()}

    def restore(self, sites: Sequence[str], content: Mapping[str, Any]) -> None:
        """Take the curves of an earlier run."""
        for site in sites:
            self.result[site] = Elimination(content[f"{site}/order"], content[f"{site}/increases"])
            self.advance()

    def _curve(self, site: SiteState) -> Elimination:
        sensitivity, consumer = self.sensitivity[site.name], site.dense_consumer
        gram = self.moments.pop(site.name).normal(affine=consumer.bias is not None).gram
        mean, root = directions(sensitivity.fisher.to(gram), sensitivity.outputs)
        channels = site.site.consumer.by_unit(site.site.units).flatten().to(gram.device)
        weight = consumer.matrix.double() @ root
        curve = eliminate(gram[channels][:, channels], weight[channels], site.site.units, RIDGE)
        return replace(curve, increases=curve.increases * float(mean) / site.calibration.tokens)


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
