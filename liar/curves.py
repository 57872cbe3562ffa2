"""Error curves: what the model's output loses with every unit that goes, if the rest is reconstructed as well as can be."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from liar.calibration import Calibration
from liar.capture import Call, Point, block_calls, preserved, run, watching
from liar.criteria.elimination import Elimination, eliminate
from liar.errors import at_site
from liar.families import base_and_prefix
from liar.sensitivity import sensitivities
from liar.sites import Layout, Site, linear
from liar.statistics import Moments
from liar.streams import around, sums, token_weight, wide

# Relative; the reconstruction looks for its own ridge per site, here one has to do for all levels.
RIDGE = 1e-3
# Share of a sensitivity that is spread over all directions at least: it is taken where the model is still whole.
EVEN = 0.2


def error_curves(model: nn.Module, layout: Layout, calibration: Calibration, progress: bool) -> dict[str, dict[str, Tensor]]:
    """By site: the `order` in which units go, int64 [units], and by how much each step `increases` the change of the output.

    A step is what the reconstruction of the site misses then, relative to the residual stream after the site, weighed by how
    much that moves the model's output (see `sensitivities`); so curves of all sites are in one unit.

    Raises:
        CalibrationError: NaN or Inf in the activations of a site, which it names.
        ModelError: parameters that gradients cannot be taken of.
    """
    sensitivity, outputs = sensitivities(model, layout, calibration, progress)
    found: dict[str, Elimination] = {}
    base, _ = base_and_prefix(model)
    blocks = [model.get_submodule(name) for name in layout.blocks]
    with preserved(model), tqdm(total=len(layout.sites), desc="select", unit="site", disable=not progress) as bar:
        hidden, calls = block_calls(base, blocks, calibration.batches)
        for number, (name, block) in enumerate(zip(layout.blocks, blocks, strict=True)):
            sites = layout.of_block(name)
            seen = _Block(block, sites)
            for batch, call in enumerate(calls[number]):
                hidden[batch] = seen.update(hidden[batch], call, calibration.keep[batch])
            for site in sites:
                found[site.name] = seen.curve(site, sensitivity.pop(site.name), outputs)
                bar.update()
    return {name: {"order": curve.order, "increases": curve.increases} for name, curve in found.items()}


class _Block:
    """Statistics of one dense block: moments of what each consumer reads, energy of the stream after each site."""

    def __init__(self, block: nn.Module, sites: tuple[Site, ...]) -> None:
        self.block, self.sites = block, sites
        self.moments = {site.name: Moments() for site in sites}
        self.energy = dict.fromkeys(self.moments, 0.0)
        self.points = around(block, sites)
        for site in sites:
            self.points[f"{site.name} in"] = Point(linear(block, site.consumer), 0)

    def update(self, hidden: Tensor, call: Call, keep: Tensor) -> Tensor:
        """Run the block on one batch; what it hands on."""
        with watching(self.points) as seen:
            output = run(self.block, hidden, call)
        totals, grows = sums(seen, self.sites, output)
        for site in self.sites:
            total = wide(totals[site.name][keep])
            weight = token_weight(total) if grows else None
            rows = seen[f"{site.name} in"][keep]
            self.moments[site.name].update(rows, rows[:, :0], weight)
            energy = total.square().sum(1) if weight is None else weight * total.square().sum(1)
            self.energy[site.name] += float(energy.sum(dtype=torch.float64))
        return output

    def curve(self, site: Site, sensitivity: Tensor, outputs: int) -> Elimination:
        """The elimination of one site, in the unit of the sensitivities."""
        consumer = linear(self.block, site.consumer)
        with at_site(site.name, site.module):
            normal = self.moments.pop(site.name).normal(affine=consumer.bias is not None)
        mean, root = directions(sensitivity.double(), outputs)
        found = eliminate(normal.gram, consumer.weight.detach().double().T @ root, site.units, RIDGE)
        return replace(found, increases=found.increases * mean * len(root) / self.energy[site.name])


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
