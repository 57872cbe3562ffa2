"""Error curves: what the model's output loses with every unit that goes, if the rest is reconstructed as well as can be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import sqrt

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from liar.batches import Calibration
from liar.capture import Call, Point, block_calls, preserved, run, watching
from liar.criteria.elimination import Elimination, eliminate
from liar.criteria.swaps import MOST, swapped
from liar.errors import at_site
from liar.families import base_and_prefix
from liar.sensitivity import Sensitivity, sensitivities
from liar.sites import Layout, Site, linear
from liar.statistics import Moments
from liar.streams import by_sequence, wide

# Relative; the reconstruction looks for its own ridge per site, here one has to do for all levels.
RIDGE = 1e-3
# Share of a sensitivity that is spread over all directions at least: it is taken where the model is still whole.
EVEN = 0.2


def error_curves(model: nn.Module, layout: Layout, calibration: Calibration, progress: bool) -> dict[str, dict[str, Tensor]]:
    """By site: `order`, `increases` and `kept` of an `Elimination`, in which swaps have a say where units are few.

    A step is what the reconstruction of the site misses then, weighed by how much that moves the model's output (see
    `Sensitivity`); so curves of all sites are in one unit, that of twice a Kullback-Leibler divergence per output.

    Raises:
        CalibrationError: NaN or Inf in the activations of a site, which it names.
        ModelError: parameters that gradients cannot be taken of.
    """
    known = sensitivities(model, layout, calibration, progress)
    found: dict[str, Elimination] = {}
    base, _ = base_and_prefix(model)
    blocks = [model.get_submodule(name) for name in layout.blocks]
    with preserved(model), tqdm(total=len(layout.sites), desc="select", unit="site", disable=not progress) as bar:
        hidden, calls = block_calls(base, blocks, calibration.batches)
        for number, (name, block) in enumerate(zip(layout.blocks, blocks, strict=True)):
            sites = layout.of_block(name)
            seen = _Block(block, sites, {site.name: known.pop(site.name) for site in sites})
            for batch, call in enumerate(calls[number]):
                hidden[batch] = seen.update(hidden[batch], call, calibration.keep[batch])
            for site in sites:
                found[site.name] = seen.curve(site, calibration.tokens)
                bar.update()
    return {name: {"order": curve.order, "increases": curve.increases, "kept": curve.kept} for name, curve in found.items()}


class _Block:
    """One dense block: moments of what each consumer reads."""

    def __init__(self, block: nn.Module, sites: tuple[Site, ...], sensitivity: Mapping[str, Sensitivity]) -> None:
        self.block, self.sites, self.sensitivity = block, sites, sensitivity
        self.moments = {site.name: Moments() for site in sites}
        self.points = {site.name: Point(linear(block, site.consumer), 0) for site in sites}

    def update(self, hidden: Tensor, call: Call, keep: Tensor) -> Tensor:
        """Run the block on one batch; what it hands on."""
        with watching(self.points) as seen:
            output = run(self.block, hidden, call)
        for site in self.sites:
            rows = raised(wide(seen[site.name][keep]), keep, self.sensitivity[site.name].coherence)
            self.moments[site.name].update(rows, rows[:, :0])
        return output

    def curve(self, site: Site, tokens: int) -> Elimination:
        """The elimination of one site, in the unit of the sensitivities."""
        sensitivity = self.sensitivity[site.name]
        consumer = linear(self.block, site.consumer)
        with at_site(site.name, site.module):
            normal = self.moments.pop(site.name).normal(affine=consumer.bias is not None)
        mean, root = directions(sensitivity.fisher.double(), sensitivity.outputs)
        weight = consumer.weight.detach().double().T @ root
        found = eliminate(normal.gram, weight, site.units, RIDGE)
        if site.units <= MOST:
            found = swapped(found, normal.gram, weight, RIDGE)
        return replace(found, increases=found.increases * mean / tokens)


def raised(rows: Tensor, keep: Tensor, coherence: float) -> Tensor:
    """Rows in whose squares the mean over a sequence counts `coherence` times, and what differs from it once.

    Args:
        rows: [tokens, channels].
        keep: which places they have, bool [sequences, length].
        coherence: see `Sensitivity`.
    """
    mean = by_sequence(rows, keep) / keep.sum(1, keepdim=True).clamp_min(1)
    return rows + (sqrt(coherence) - 1) * mean[keep.nonzero()[:, 0]]


def directions(sensitivity: Tensor, outputs: int) -> tuple[Tensor, Tensor]:
    """(m, root) of a sensitivity F [out, out]: `m root root'` is F with a part of it spread evenly over all directions.

    The error of a reconstruction times the root has the squares that count; m is the mean of F's diagonal. Gradients of a few
    outputs are partly chance, so the fewer there were, the larger that part. Where the output is moved by nothing at all, m
    is 0 and all directions count alike.
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
    power = covariance.square().mean()
    spread = (samples + 1) * (power - even / size)
    return float(((power + even) / spread).clamp_max(1)) if spread > 0 else 1.0
