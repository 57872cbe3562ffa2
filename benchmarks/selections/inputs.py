"""Second moments of what every consumer reads in the dense model, for selections that eliminate units by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import liar
from benchmarks.baselines.osscar import DAMPING
from liar.repair import RepairStep, SiteState, walk_blocks
from liar.runtime import widen
from liar.selection import eliminate
from liar.statistics import Moments


@dataclass(frozen=True)
class Inputs:
    """One site's: the Gram matrix of its consumer's input, uncentred, and the consumer's weight.

    Attributes:
        gram: [channels, channels], the channels of a unit side by side, float64.
        weight: [channels, out], likewise.
        channels: int64 [channels], where each is in the consumer.
    """

    gram: Tensor
    weight: Tensor
    channels: Tensor

    def order(self, units: int) -> Tensor:
        """The units as OSSCAR's elimination removes them, int64 [units]: the one that goes first comes first."""
        return eliminate(self.gram, self.weight, units, DAMPING).order


def inputs_of(model: nn.Module, batches: Sequence[Any]) -> dict[str, Inputs]:
    """By site, from one dense pass."""
    step = _Collect()
    walk_blocks(model, liar.discover(model), liar.Calibration.of(batches, model), [step])
    return step.result


class _Collect(RepairStep):
    captures = frozenset({"consumer_input"})

    def __init__(self) -> None:
        self.moments: dict[str, Moments] = {}
        self.result: dict[str, Inputs] = {}

    def observe(self, site: SiteState, batch: int, dense: Mapping[str, Tensor]) -> None:
        rows = widen(dense["consumer_input"][site.calibration.token_masks[batch]])
        self.moments.setdefault(site.name, Moments()).update(rows, rows[:, :0])

    def repair(self, site: SiteState) -> None:
        gram = self.moments.pop(site.name).normal(affine=False).gram
        channels = site.site.consumer.by_unit(site.site.units).flatten().to(gram.device)
        weight = site.dense_consumer.matrix.double()
        self.result[site.name] = Inputs(gram[channels][:, channels], weight[channels], channels)
