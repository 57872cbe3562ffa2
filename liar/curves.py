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


def error_curves(model: nn.Module, layout: Layout, calibration: Calibration, progress: bool) -> dict[str, dict[str, Tensor]]:
    """By site: the `order` in which units go, int64 [units], and by how much each step `increases` the change of the output.

    A site's own curve is the energy of what its reconstruction misses, over the energy of the residual stream after the
    site; it is multiplied by the site's sensitivity, so that curves of all sites are in one unit.

    Raises:
        CalibrationError: NaN or Inf in the activations of a site, which it names.
    """
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
                found[site.name] = seen.curve(site)
                bar.update()
    factors = sensitivities(model, layout, calibration, progress)
    return {name: {"order": curve.order, "increases": curve.increases * factors[name]} for name, curve in found.items()}


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

    def curve(self, site: Site) -> Elimination:
        """The elimination of one site, relative to the energy of the stream after it."""
        consumer = linear(self.block, site.consumer)
        with at_site(site.name, site.module):
            normal = self.moments.pop(site.name).normal(affine=consumer.bias is not None)
        found = eliminate(normal.gram, consumer.weight.detach().double().T, site.units, RIDGE)
        return replace(found, increases=found.increases / self.energy[site.name])
