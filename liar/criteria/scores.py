"""Criteria: pure functions from the weights and the activations of one site to one score per unit; high scores stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from scipy.optimize import isotonic_regression
from torch import Tensor, nn

from liar.sites import Site, linear


@dataclass(frozen=True)
class Units:
    """One site, seen by unit; all float64.

    Attributes:
        producers: weights that make the units, [units, *] each.
        consumer: weights that read the units, [units, width, out].
        parameters: that go away with one unit.
        known: what was collected at the site, by name; see `NEEDS`.
        seed: for `random`.
    """

    producers: tuple[Tensor, ...]
    consumer: Tensor
    parameters: int
    known: Mapping[str, Tensor]
    seed: int

    @classmethod
    def of(cls, block: nn.Module, site: Site, known: Mapping[str, Tensor], *, seed: int = 0) -> Units:
        """Gather a site's weights from its block."""
        rows = tuple(linear(block, edge).weight.detach().double().reshape(site.units, -1) for edge in site.producers)
        columns = linear(block, site.consumer).weight.detach().double().T
        return cls(rows, columns.reshape(site.units, site.consumer.width, -1), site.parameters, known, seed)

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
    norm = units.per_channel((units.known["variance"] + units.known["mean"].square()).sqrt())
    return (units.consumer.abs().sum(2) * norm).sum(1)


def fluctuation(units: Units) -> Tensor:
    """Variance of the input times the squared norm of the weights that read it (FLAP, An et al. 2023, eq. 5: WIFV).

    What a bias cannot replace once the unit is gone.
    """
    variance = units.per_channel(units.known["variance"])
    return (units.consumer.square().sum(2) * variance).sum(1)


def taylor(units: Units) -> Tensor:
    """Change of the loss to first order when the unit goes, per parameter (Molchanov et al. 2019, section 3, on a gate).

    `|dL/dm|` with m a factor on the unit, summed over the data. It is also `|sum of w * dL/dw|` over the consumer's weights of
    the unit, so what LLM-Pruner calls vector-wise importance (Ma et al. 2023, section 3.2), of that layer. Without labels of
    the data the expected sum is zero, and this is but one draw.
    """
    return units.known["gradient"].abs() / units.parameters


def fisher(units: Units) -> Tensor:
    """Sum over sequences of (dL/dm)^2, per parameter (Kwon et al. 2022, section 4.1: the diagonal of the Fisher information).

    Half of it is the change of the loss to second order when the unit goes, where the gradient itself is small.
    """
    return units.known["squared_gradient"] / units.parameters


def snip(units: Units) -> Tensor:
    """Sum over the unit's weights of |w * dL/dw|, per parameter (Lee et al. 2019, section 4.1, summed over the unit)."""
    return units.known["weight_gradient"] / units.parameters


def reconstruction(units: Units) -> Tensor:
    """What a unit adds to the change of the model's output when it goes, per parameter, the rest being reconstructed.

    Taking the cheapest step anywhere, again and again, shares a budget over sites at least total error if every curve
    bends upwards; where one does not, its steps are levelled (isotonic regression), which is the exact answer but for the
    last step (Fox 1966, discrete optimisation via marginal analysis).
    """
    order, increases = units.known["order"], units.known["increases"]
    steps = torch.from_numpy(isotonic_regression(increases.numpy()).x) / units.parameters
    # Levelled steps keep their order.
    steps = steps * (1 + 1e-9 * torch.arange(len(steps))) + 1e-300 * torch.arange(len(steps))
    return torch.empty_like(steps).index_copy_(0, order, steps)


# What can be collected at a site besides its weights, and the names of the tensors that make it up.
NEEDS: dict[str, tuple[str, ...]] = {
    # [channels]: of what the consumer reads.
    "channels": ("mean", "variance"),
    # [units]: the order in which units go, and what each adds to the change of the model's output; [units + 1, units] or
    # [0, units]: which ones stay, by their number, where they are not simply the last to go.
    "curves": ("order", "increases", "kept"),
    # [units]: of the loss, by a factor on the unit and by its weights.
    "gradients": ("gradient", "squared_gradient", "weight_gradient"),
}


@dataclass(frozen=True)
class Criterion:
    """A score, and what it is made from.

    Attributes:
        score: one number per unit; high ones stay.
        needs: a key of `NEEDS`, or None if the weights are enough.
        comparable: whether scores of different sites are in one unit.
        sets: the name in `NEEDS` of the best units by their number, if those are not always the ones that score most.
    """

    score: Callable[[Units], Tensor]
    needs: str | None
    comparable: bool = False
    sets: str | None = None


CRITERIA: dict[str, Criterion] = {
    "reconstruction": Criterion(reconstruction, "curves", comparable=True, sets="kept"),
    "fluctuation": Criterion(fluctuation, "channels"),
    "wanda": Criterion(wanda, "channels"),
    "taylor": Criterion(taylor, "gradients", comparable=True),
    "fisher": Criterion(fisher, "gradients", comparable=True),
    "snip": Criterion(snip, "gradients", comparable=True),
    "magnitude": Criterion(magnitude, None),
    "random": Criterion(random, None),
}


def scores(criterion: str, units: Units) -> Tensor:
    """Scores [units] of one site by the named criterion, on the CPU."""
    return CRITERIA[criterion].score(units).cpu()
