"""Where what a run holds is kept: on the compute device, in host memory, or on disk."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage
from tempfile import gettempdir
from typing import Any

import torch
from torch import nn

from liar.data import Calibration
from liar.models import compute_device, is_offloaded, layout_of
from liar.options import ReconstructOptions, SelectOptions
from liar.planning.memory import Phase, phases
from liar.planning.passes import kept_units, workload_of
from liar.planning.workload import Data, Workload
from liar.selection import CRITERIA

logger = logging.getLogger(__name__)

# Activations that are kept elsewhere: those of the batch that is worked on, and of the next one, which is on its way.
UNDER_WAY = 2
# Share of the free memory that a run may plan for.
MARGIN = 0.85
# Over the bytes of tensors: buffers of libraries, and what an allocator keeps, as measured on a CPU (docs/scaling.md).
ALLOCATED = 1.05
# From the fastest to the slowest.
ORDER = ("device", "host", "disk")


@dataclass(frozen=True)
class Memory:
    """Peak memory by place, in bytes, and when the device, or a CPU's host, has it.

    Attributes:
        device: on the compute device; 0 where that is the CPU.
        host: in the host's memory.
        disk: of activations on disk.
        stage: in which the peak of the place that computes is.
        phase: what happens then.
        added: of that peak, what the run adds to the model.
    """

    device: float
    host: float
    disk: float
    stage: str
    phase: str
    added: float


def memory(workload: Workload, steps: Sequence[Phase], activations: str, *, on_cpu: bool, offload: bool) -> Memory:
    """The peak of every place, where activations are kept in one of them.

    Args:
        workload: a model and its data.
        steps: the phases of a run.
        activations: `"device"`, `"host"` or `"disk"`.
        on_cpu: whether the compute device is the host.
        offload: whether weights come one block at a time: to a device from the host's memory, to a CPU from files.
    """
    largest = max(steps, key=lambda step: _computing(workload, step, activations, on_cpu=on_cpu, offload=offload))
    computing = _computing(workload, largest, activations, on_cpu=on_cpu, offload=offload)
    disk = max(step.activations for step in steps) if activations == "disk" else 0.0
    aside = max(_aside(workload, step, activations, offload=offload) for step in steps)
    added = computing - _weights(workload, offload=offload)
    places = (0.0, computing) if on_cpu else (computing, aside)
    return Memory(*places, disk, largest.stage, largest.name, added)


def _weights(workload: Workload, *, offload: bool) -> float:
    """The dense weights that have to be where it is computed, at a time."""
    return float(workload.largest_at_once if offload else workload.nbytes)


def _computing(workload: Workload, step: Phase, activations: str, *, on_cpu: bool, offload: bool) -> float:
    """Bytes where it is computed."""
    stays = activations == "device" or (activations == "host" and on_cpu)
    kept = step.activations if stays else min(UNDER_WAY * step.batch, step.activations)
    # Slim copies of offloaded blocks are in the host's memory, which on a CPU is where it is computed.
    slim = min(step.slim, max(block.nbytes for block in workload.blocks)) if offload and not on_cpu else step.slim
    return _weights(workload, offload=offload) + (slim + kept + step.work) * ALLOCATED


def _aside(workload: Workload, step: Phase, activations: str, *, offload: bool) -> float:
    """Bytes in the host's memory, where another device computes."""
    weights = workload.nbytes + step.slim if offload else 0.0
    return weights + (step.activations if activations == "host" else 0.0)


def free_memory(device: torch.device) -> dict[str, float]:
    """Bytes that are free on the device, in the host's memory, and on the disk of temporary files."""
    host = _free_on_host()
    on_device = float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else host
    return {"device": on_device, "host": host, "disk": float(disk_usage(gettempdir()).free)}


def _free_on_host() -> float:
    """Bytes that programs can have: Linux counts what caches would give back."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def choose_activations(
    model: nn.Module,
    calibration: Calibration,
    options: ReconstructOptions,
    *,
    selection: SelectOptions | None = None,
    masks: Mapping[str, Any] | None = None,
    free: Mapping[str, float] | None = None,
) -> str:
    """Where a run should keep its activations: the fastest of device, host and disk at which what it adds fits.

    Where that cannot be told, since a step of the model looks at values, they stay on the device, with a warning.

    Args:
        model: that is about to be cut; its weights are there already.
        calibration: what it is repaired on.
        options: how.
        selection: how its units are selected, where they still are to be.
        masks: the units that stay, by site, where they are selected.
        free: bytes by place; what is free now if not given.
    """
    try:
        return _fastest(model, calibration, options, selection, masks, free)
    except Exception as error:  # noqa: BLE001 (a hook may raise anything on tensors without values; the run may be fine)
        logger.warning(
            "activations='auto': how much memory a %s needs cannot be planned (%s); activations stay where they are "
            "computed: choose 'host' or 'disk' if they do not fit there",
            type(model).__name__, error,
        )  # fmt: skip
        return ORDER[0]


def _fastest(
    model: nn.Module,
    calibration: Calibration,
    options: ReconstructOptions,
    selection: SelectOptions | None,
    masks: Mapping[str, Any] | None,
    free: Mapping[str, float] | None,
) -> str:
    """The fastest place at which a run fits, by the plan."""
    layout = layout_of(model)
    device, offload = compute_device(model), is_offloaded(model)
    free = free_memory(device) if free is None else free
    if masks is None:
        kept = kept_units(layout, 1.0 if selection is None else selection.keep)
    else:
        layout = layout.matching(masks)
        kept = {site.name: max(int(masks[site.name].sum()), 1) for site in layout.sites}
    needs = None if selection is None else CRITERIA[selection.criterion].needs
    is_free = masks is None and selection is not None and selection.widths == "free"
    data = Data.of_calibration(calibration)
    workload = workload_of(model, layout, data, kept, weights=needs == "gradients", is_free=is_free, offload=offload)
    steps = phases(workload, selection or SelectOptions(1.0, "magnitude"), options)
    on_cpu = device.type == "cpu"
    for activations in ORDER:
        needed = memory(workload, steps, activations, on_cpu=on_cpu, offload=offload)
        host = needed.added if on_cpu else needed.host
        wanted = {"device": 0.0 if on_cpu else needed.added, "host": host, "disk": needed.disk}
        if all(wanted[place] <= MARGIN * free[place] for place in ORDER):
            return activations
    return ORDER[-1]
