"""Criteria: pure functions from the weights and the activations of one site to one score per unit; high scores stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from liar.sites import Site, linear
from liar.statistics import ChannelMoments


@dataclass(frozen=True)
class Units:
    """One site, seen by unit; all float64.

    Attributes:
        producers: weights that make the units, [units, *] each.
        consumer: weights that read the units, [units, width, out].
        moments: of the consumer's input, one entry per channel; None for criteria that need no data.
        seed: for `random`.
    """

    producers: tuple[Tensor, ...]
    consumer: Tensor
    moments: ChannelMoments | None
    seed: int

    @classmethod
    def of(cls, block: nn.Module, site: Site, moments: ChannelMoments | None, seed: int) -> Units:
        """Gather a site's weights from its block."""
        rows = tuple(linear(block, edge).weight.detach().double().reshape(site.units, -1) for edge in site.producers)
        columns = linear(block, site.consumer).weight.detach().double().T
        return cls(rows, columns.reshape(site.units, site.consumer.width, -1), moments, seed)

    def per_channel(self, values: Tensor) -> Tensor:
        """[channels] -> [units, width]."""
        return values.reshape(self.consumer.shape[:2])


def random(units: Units) -> Tensor:
    """Uniform scores: the baseline every criterion must beat."""
    generator = torch.Generator().manual_seed(units.seed)
    return torch.rand(len(units.consumer), generator=generator, dtype=torch.float64)


def magnitude(units: Units) -> Tensor:
    """Root mean square of all weights of the unit, producers and consumer."""
    weights = torch.cat([*units.producers, units.consumer.flatten(1)], 1)
    return weights.square().mean(1).sqrt()


def wanda(units: Units) -> Tensor:
    """Sum of |weight| times the norm of its input (Sun et al. 2023, eq. 1, summed over the unit as FLAP's wanda-sp does)."""
    assert units.moments is not None
    norm = units.per_channel(units.moments.mean_square.sqrt())
    return (units.consumer.abs().sum(2) * norm).sum(1)


def fluctuation(units: Units) -> Tensor:
    """Variance of the input times the squared norm of the weights that read it (FLAP, An et al. 2023, eq. 5: WIFV).

    What a bias cannot replace once the unit is gone.
    """
    assert units.moments is not None
    variance = units.per_channel(units.moments.variance)
    return (units.consumer.square().sum(2) * variance).sum(1)


Criterion = Callable[[Units], Tensor]
# name -> (score, whether it needs activations)
CRITERIA: dict[str, tuple[Criterion, bool]] = {
    "random": (random, False),
    "magnitude": (magnitude, False),
    "wanda": (wanda, True),
    "fluctuation": (fluctuation, True),
}


def scores(criterion: str, units: Units) -> Tensor:
    """Scores [units] of one site by the named criterion, on the CPU."""
    return CRITERIA[criterion][0](units).cpu()
