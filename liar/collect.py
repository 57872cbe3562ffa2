"""What criteria look at besides weights: collected in one go, kept in a file, good for every budget."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from liar.batches import Calibration
from liar.criteria import CRITERIA, NEEDS
from liar.curves import error_curves
from liar.errors import CalibrationError, choose
from liar.families import checked
from liar.gradients import unit_gradients
from liar.moments import channel_moments
from liar.sites import Layout, linear

Known = dict[str, dict[str, Tensor]]
COLLECTORS: dict[str, Callable[[nn.Module, Layout, Calibration, bool], Known]] = {
    "channels": channel_moments,
    "curves": error_curves,
    "gradients": unit_gradients,
}
# Norms of weights that differ by more are of other weights; rounding to another float type differs by less.
SAME = 1e-4


@dataclass(frozen=True)
class Statistics:
    """What was collected at the sites of one model: a few numbers per unit or channel.

    Attributes:
        sites: site name -> name (see `liar.criteria.NEEDS`) -> tensor on the CPU.
        norms: site name -> Frobenius norm of the consumer's weight, by which the model is known again.
        tokens: calibration tokens that were seen.

    Example:
        >>> statistics = liar.collect(model, calib)
        >>> [round(liar.select(model, statistics, keep=keep).asked, 1) for keep in (0.7, 0.5)]
        [0.7, 0.5]
    """

    sites: Mapping[str, Mapping[str, Tensor]]
    norms: Mapping[str, float]
    tokens: int

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        tensors = {f"{site}/{name}": value.contiguous() for site, known in self.sites.items() for name, value in known.items()}
        about = {"norms": json.dumps(dict(self.norms)), "tokens": str(self.tokens)}
        save_file(tensors, str(path), metadata=about)

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read a file that `save` wrote.

        Raises:
            CalibrationError: it is not one.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                about = file.metadata()
                norms: dict[str, float] = json.loads(about["norms"])
                sites: Known = {name: {} for name in norms}
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    site, _, name = key.partition("/")
                    sites[site][name] = file.get_tensor(key)
            return cls(sites, norms, int(about["tokens"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CalibrationError(f"{path}: expected a file that Statistics.save wrote, got {error!r}") from error

    def check(self, model: nn.Module, layout: Layout, criterion: str) -> None:
        """Whether a criterion finds here what it needs to know of a model.

        Raises:
            CalibrationError: it does not, or the statistics are those of another model.
        """
        norms = consumer_norms(model, layout)
        if norms.keys() != self.norms.keys() or not all(isclose(norms[name], self.norms[name], rel_tol=SAME) for name in norms):
            raise CalibrationError(
                "the statistics were collected from another model, or this one has changed since: collect them anew"
            )
        needs = CRITERIA[criterion].needs
        if needs and any(name not in known for known in self.sites.values() for name in NEEDS[needs]):
            raise CalibrationError(
                f"criterion={criterion!r} needs {' and '.join(NEEDS[needs])} of every site, which was not collected: "
                f"call liar.collect(model, calib, criteria=[{criterion!r}])"
            )


def consumer_norms(model: nn.Module, layout: Layout) -> dict[str, float]:
    """Frobenius norm of the consumer's weight by site."""
    layers = {site.name: linear(model.get_submodule(site.block), site.consumer) for site in layout.sites}
    return {name: float(layer.weight.detach().norm(dtype=torch.float64)) for name, layer in layers.items()}


def collect(
    model: nn.Module, calib: Iterable[Any], *, criteria: Sequence[str] = ("reconstruction",), progress: bool = True
) -> Statistics:
    """Collect once what `select` needs to know, for as many budgets as are wanted.

    Args:
        model: a Hugging Face model of a known family; it is not changed.
        calib: calibration batches (see `Calibration.of`).
        criteria: that will be asked for; what several of them need is collected once.
        progress: show bars.

    Returns:
        Frozen `Statistics`, to be given to `select` in place of calibration batches.

    Raises:
        OptionError, CalibrationError, ModelError: with what was expected, what came, and what to do.

    Example:
        >>> statistics = liar.collect(model, calib, criteria=["fluctuation", "wanda"])
        >>> sorted(statistics.sites["neurons.0"])
        ['mean', 'variance']
    """
    for criterion in criteria:
        choose("criterion", criterion, list(CRITERIA))
    layout = checked(model)
    calibration = Calibration.of(calib, model)
    sites: Known = {site.name: {} for site in layout.sites}
    for needs in dict.fromkeys(CRITERIA[criterion].needs for criterion in criteria):
        if needs:
            for name, known in COLLECTORS[needs](model, layout, calibration, progress).items():
                sites[name] |= {key: value.cpu() for key, value in known.items()}
    return Statistics(sites, consumer_norms(model, layout), calibration.tokens)
