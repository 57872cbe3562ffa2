"""Criteria: pure functions from the weights and the activations of one site to one score per unit; high scores stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import getsource

import torch
from scipy.optimize import isotonic_regression
from torch import Tensor, nn

from liar.models import Site, layer_of
from liar.options import CRITERIA as SUMMARIES
from liar.runtime import output_scale


@dataclass(frozen=True)
class SiteWeights:
    """The weights of one site by unit, and what was collected there; all float64.

    Attributes:
        producers: weights that make the units, [units, *] each.
        consumer: weights that read the units, [units, width, out], with the scale of what they give (see `output_scale`).
        parameters: that go away with one unit.
        statistics: what was collected at the site, by name; see `STATISTICS`.
        seed: for `random`.

    Example:
        >>> from liar.selection import SiteWeights
        >>> site = liar.discover(model)["heads.0"]
        >>> weights = SiteWeights.of(model.get_submodule(site.block), site, statistics={})
        >>> [producer.shape[0] for producer in weights.producers], weights.consumer.shape
        ([4, 4, 4], torch.Size([4, 8, 32]))
    """

    producers: tuple[Tensor, ...]
    consumer: Tensor
    parameters: int
    statistics: Mapping[str, Tensor]
    seed: int

    @classmethod
    def of(cls, block: nn.Module, site: Site, statistics: Mapping[str, Tensor], *, seed: int = 0) -> SiteWeights:
        """Gather a site's weights from its block."""
        producers = tuple(
            layer_of(block, edge).matrix.T.double()[edge.by_unit(site.units)].flatten(1) for edge in site.producers
        )
        matrix = layer_of(block, site.consumer).matrix.double() * output_scale(block, site)
        consumer = matrix[site.consumer.by_unit(site.units)].detach()
        return cls(producers, consumer, site.parameters, statistics, seed)

    def per_channel(self, values: Tensor) -> Tensor:
        """[channels], the channels of a unit side by side -> [units, width]."""
        return values.to(self.consumer.device).reshape(self.consumer.shape[:2])


def random(units: SiteWeights) -> Tensor:
    """Uniform scores: the baseline every criterion must beat."""
    generator = torch.Generator().manual_seed(units.seed)
    return torch.rand(len(units.consumer), generator=generator, dtype=torch.float64)


def magnitude(units: SiteWeights) -> Tensor:
    """Root mean square of all weights of the unit, producers and consumer."""
    weights = torch.cat([*units.producers, units.consumer.flatten(1)], 1)
    return weights.square().mean(1).sqrt()


def wanda(units: SiteWeights) -> Tensor:
    """Sum of |weight| times the norm of its input (Sun et al. 2023, eq. 1, summed over the unit as FLAP's wanda-sp does)."""
    norm = units.per_channel((units.statistics["variance"] + units.statistics["mean"].square()).sqrt())
    return (units.consumer.abs().sum(2) * norm).sum(1)


def fluctuation(units: SiteWeights) -> Tensor:
    """Variance of the input times the squared norm of the weights that read it (FLAP, An et al. 2023, eq. 5: WIFV).

    What a bias cannot replace once the unit is gone.
    """
    variance = units.per_channel(units.statistics["variance"])
    return (units.consumer.square().sum(2) * variance).sum(1)


def taylor(units: SiteWeights) -> Tensor:
    """Change of the loss to first order when the unit goes, per parameter (Molchanov et al. 2019, section 3, on a gate).

    `|dL/dm|` with m a factor on the unit, summed over the data. It is also `|sum of w * dL/dw|` over the consumer's weights of
    the unit, so what LLM-Pruner calls vector-wise importance (Ma et al. 2023, section 3.2), of that layer. Without labels of
    the data the expected sum is zero, and this is but one draw.
    """
    return units.statistics["gradient"].abs() / units.parameters


def fisher(units: SiteWeights) -> Tensor:
    """Sum over sequences of (dL/dm)^2, per parameter (Kwon et al. 2022, section 4.1: the diagonal of the Fisher information).

    Half of it is the change of the loss to second order when the unit goes, where the gradient itself is small.
    """
    return units.statistics["squared_gradient"] / units.parameters


def snip(units: SiteWeights) -> Tensor:
    """Sum over the unit's weights of |w * dL/dw|, per parameter (Lee et al. 2019, section 4.1, summed over the unit)."""
    return units.statistics["weight_gradient"] / units.parameters


def reconstruction(units: SiteWeights) -> Tensor:
    """What a unit adds to the change of the model's output when it goes, per parameter, the rest being reconstructed.

    Taking the cheapest step anywhere, again and again, shares a budget over sites at least total error if every curve
    bends upwards; where one does not, its steps are levelled (isotonic regression), which is the exact answer but for the
    last step (Fox 1966, discrete optimisation via marginal analysis).
    """
    order, increases = units.statistics["order"], units.statistics["increases"]
    steps = torch.from_numpy(isotonic_regression(increases.numpy()).x) / units.parameters
    # Levelled steps keep their order.
    steps = steps * (1 + 1e-9 * torch.arange(len(steps))) + 1e-300 * torch.arange(len(steps))
    return torch.empty_like(steps).index_copy_(0, order, steps)


# What can be collected at a site besides its weights, and the names of the tensors that make it up.
STATISTICS: dict[str, tuple[str, ...]] = {
    # [channels]: of what the consumer reads, the channels of a unit side by side.
    "channels": ("mean", "variance"),
    # [units]: the order in which units go, and what each adds to the change of the model's output.
    "curves": ("order", "increases"),
    # [units]: of the loss, by a factor on the unit and by its weights.
    "gradients": ("gradient", "squared_gradient", "weight_gradient"),
}


@dataclass(frozen=True)
class Criterion:
    """A score, and what it is made from.

    Attributes:
        score: one number per unit; high ones stay.
        needs: a key of `STATISTICS`, or None if the weights are enough.
        comparable: whether scores of different sites are in one unit.

    Example:
        >>> from liar.selection import Criterion
        >>> largest = Criterion(lambda units: units.consumer.flatten(1).abs().amax(1), needs=None)
        >>> largest.comparable
        False
    """

    score: Callable[[SiteWeights], Tensor]
    needs: str | None
    comparable: bool = False


CRITERIA: dict[str, Criterion] = {
    "reconstruction": Criterion(reconstruction, "curves", comparable=True),
    "fluctuation": Criterion(fluctuation, "channels"),
    "wanda": Criterion(wanda, "channels"),
    "taylor": Criterion(taylor, "gradients", comparable=True),
    "fisher": Criterion(fisher, "gradients", comparable=True),
    "snip": Criterion(snip, "gradients", comparable=True),
    "magnitude": Criterion(magnitude, None),
    "random": Criterion(random, None),
}


def register_criterion(name: str, criterion: Criterion, summary: str) -> None:
    """Make a criterion known to `select`, `collect` and `prune`.

    Args:
        name: as users give it.
        criterion: its score.
        summary: one line for people.

    Example:
        >>> from liar.selection import Criterion, register_criterion
        >>> norms = Criterion(lambda units: units.consumer.flatten(1).norm(dim=1), needs=None)
        >>> register_criterion("norm", norms, "norm of the weights that read the unit")
        >>> liar.select(model, keep=0.5, criterion="norm", progress=False).kept("neurons.0") > 0
        True
    """
    CRITERIA[name], SUMMARIES[name] = criterion, summary


def source_of(criterion: str) -> str:
    """What tells a criterion from another one that was registered by the same name: its source, or its name without one.

    Empty for those of the library, which its version tells apart.
    """
    score = CRITERIA[criterion].score
    if getattr(score, "__module__", "").partition(".")[0] == "liar":
        return ""
    try:
        return getsource(score)
    except (OSError, TypeError):
        return str(getattr(score, "__qualname__", type(score).__qualname__))


def scores(criterion: str, units: SiteWeights) -> Tensor:
    """Scores [units] of one site by the named criterion, on the CPU."""
    return CRITERIA[criterion].score(units).cpu()
