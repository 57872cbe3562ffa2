"""What criteria need besides weights: collected once, kept in a file, reused for every budget."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isclose
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from liar.analysis import channel_moments
from liar.data import Calibration
from liar.errors import CalibrationError
from liar.files import replacing_file, user_path
from liar.models import Layout, check_kept_here, layer_of, layout_with_weights, plain_block
from liar.progress import Progress
from liar.runtime import Workspace
from liar.selection.error_curves import error_curves
from liar.selection.gradients import unit_gradients
from liar.selection.scores import CRITERIA, STATISTICS

SiteTensors = dict[str, dict[str, Tensor]]
# Of these, the curves are long work that can go on after a kill; the others take one pass.
COLLECTORS: dict[str, Callable[[nn.Module, Layout, Calibration, Progress, Workspace], SiteTensors]] = {
    "channels": lambda *known: channel_moments(*known[:4]),
    "curves": error_curves,
    "gradients": lambda *known: unit_gradients(*known[:4]),
}
# The stages of each, and about how many forward passes of the dense model they take (benchmarks/README.md, "Speed").
STAGES: dict[str, dict[str, float]] = {
    "channels": {"moments": 1},
    "curves": {"sensitivity": 1.5, "elimination": 2},
    "gradients": {"gradients": 3},
}
# Norms of weights that differ by more are of other weights; rounding to another float type differs by less.
SAME_NORM = 1e-4


@dataclass(frozen=True)
class CriterionStatistics:
    """What was collected at the sites of one model: a few numbers per unit or channel.

    Attributes:
        sites: site name -> name (see `liar.selection.STATISTICS`) -> tensor on the CPU.
        norms: site name -> Frobenius norm of the consumer's weight, by which the model is recognised.
        tokens: calibration tokens that were used.

    Example:
        >>> statistics = liar.collect(model, calib)
        >>> [round(liar.select(model, statistics, keep=keep).requested, 1) for keep in (0.7, 0.5)]
        [0.7, 0.5]
    """

    sites: Mapping[str, Mapping[str, Tensor]]
    norms: Mapping[str, float]
    tokens: int

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all."""
        tensors = {
            f"{site}/{name}": value.contiguous() for site, values in self.sites.items() for name, value in values.items()
        }
        metadata = {"norms": json.dumps(dict(self.norms)), "tokens": str(self.tokens)}
        with replacing_file(path) as fresh:
            save_file(tensors, fresh, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> CriterionStatistics:
        """Read a file that `save` wrote.

        Raises:
            CalibrationError: it is not one.
        """
        try:
            with safe_open(str(user_path(path)), framework="pt") as file:
                metadata = file.metadata()
                norms = {name: float(norm) for name, norm in json.loads(metadata["norms"]).items()}
                sites: SiteTensors = {name: {} for name in norms}
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    site, _, name = key.partition("/")
                    sites[site][name] = file.get_tensor(key)
            return cls(sites, norms, int(metadata["tokens"]))
        except (
            OSError,
            SafetensorError,
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
            RuntimeError,
            OverflowError,
        ) as error:
            raise CalibrationError(f"{path}: expected a file that CriterionStatistics.save wrote, got {error!r}") from error

    def check(self, model: nn.Module, layout: Layout, criterion: str) -> None:
        """Check that these are the statistics of a model, with all that a criterion needs.

        Raises:
            CalibrationError: they are not.
        """
        norms = consumer_norms(model, layout)
        if norms.keys() != self.norms.keys() or not all(
            isclose(norms[name], self.norms[name], rel_tol=SAME_NORM) for name in norms
        ):
            raise CalibrationError(
                "the statistics were collected from another model, or this one has changed since: collect them anew"
            )
        needs = CRITERIA[criterion].needs
        for site in layout.sites if needs else ():
            for name in STATISTICS[needs or ""]:
                value = dict(self.sites.get(site.name, {})).get(name)
                units = site.units * (site.consumer.width if needs == "channels" else 1)
                if value is not None and not isinstance(value, Tensor):
                    raise CalibrationError(f"the statistics are damaged: {name} of {site.name} is a {type(value).__name__}")
                if value is not None and (value.shape != (units,) or not bool(torch.isfinite(value).all())):
                    raise CalibrationError(
                        f"the statistics are damaged: expected {units} finite numbers as {name} of {site.name}, got "
                        f"{list(value.shape)}: collect them anew, with the same heads"
                    )
        if needs == "curves" and any(
            not torch.equal(values["order"].sort().values, torch.arange(len(values["order"])))
            for values in self.sites.values()
            if "order" in values
        ):
            raise CalibrationError("the statistics are damaged: expected an order of all units: collect them anew")
        if needs and any(name not in values for values in self.sites.values() for name in STATISTICS[needs]):
            raise CalibrationError(
                f"criterion={criterion!r} needs {' and '.join(STATISTICS[needs])} of every site, which was not collected: "
                f"call liar.collect(model, calib, criteria=[{criterion!r}])"
            )


def stages_of(criteria: Sequence[str]) -> dict[str, float]:
    """The stages of collecting what some criteria need; see `Progress`."""
    return {name: share for needs in needs_of(criteria) for name, share in STAGES[needs].items()}


def needs_of(criteria: Sequence[str]) -> list[str]:
    """What some criteria need, each once."""
    return list(dict.fromkeys(needs for criterion in criteria if (needs := CRITERIA[criterion].needs)))


def _without_gradients() -> str:
    """The criteria that need no gradients of weights."""
    names = [name for name, criterion in CRITERIA.items() if criterion.needs != "gradients"]
    return f"another criterion: {', '.join(names)}"


def consumer_norms(model: nn.Module, layout: Layout) -> dict[str, float]:
    """Frobenius norm of the consumer's weight by site."""
    return {
        site.name: float(layer_of(block, site.consumer).matrix.norm(dtype=torch.float64))
        for name in layout.blocks
        for block in [plain_block(model.get_submodule(name))]
        for site in layout.of_block(name)
    }


def collect_with(
    model: nn.Module,
    calibration: Calibration,
    criteria: Sequence[str],
    heads: str,
    progress: Progress,
    workspace: Workspace,
) -> CriterionStatistics:
    """`collect` on a model that is locked, with options that are checked."""
    layout = layout_with_weights(model).counted_by(heads)
    if "gradients" in needs_of(criteria):
        check_kept_here(model, f"gradients of weights ({', '.join(criteria)})", "choose " + _without_gradients())
    sites: SiteTensors = {site.name: {} for site in layout.sites}
    for needs in needs_of(criteria):
        known = workspace.read(needs)
        if known is None:
            collected = COLLECTORS[needs](model, layout, calibration, progress, workspace)
            known = {f"{site}/{name}": value.cpu() for site, values in collected.items() for name, value in values.items()}
            workspace.commit(needs, known)
        for key, value in known.items():
            site, _, name = key.partition("/")
            sites[site][name] = value
    return CriterionStatistics(sites, consumer_norms(model, layout), calibration.tokens)
