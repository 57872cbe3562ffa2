"""`plan`: what `prune` will need with some options, before anything runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from liar.data import Calibration, transformer_and_data
from liar.errors import OptionError
from liar.io import model_from_config
from liar.models import compute_device, is_offloaded, layout_of, transformer_in, why_unusable
from liar.options import LoadOptions, PlanOptions, ReconstructOptions, SelectOptions, check_count
from liar.planning.memory import phases
from liar.planning.operations import works
from liar.planning.passes import kept_units, workload_of
from liar.planning.places import ORDER, Memory, memory
from liar.planning.rates import Rates, measure_rates
from liar.planning.workload import Data
from liar.selection import CRITERIA

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Seconds up to which a time is shown in a smaller unit.
UNITS = (("s", 1.0, 120.0), ("min", 60.0, 7_200.0), ("h", 3_600.0, float("inf")))


@dataclass(frozen=True)
class Plan:
    """What `liar.prune` needs with some options.

    Attributes:
        model: name of its class.
        parameters: of the model.
        tokens: of the calibration data.
        dtype: of the weights.
        device: where it is computed.
        model_bytes: of all weights.
        memory: by place of the activations, peak bytes on the compute device, in the host's memory and on disk, the model
            included; on a CPU the device is the host. `stage` and `phase` say when, `added` is what the run adds to the
            weights.
        flops: floating-point operations by stage.
        seconds: by stage, at the rates measured on the device; None without measured rates.
        rates: operations per second by kind, bytes per second for `traffic`; None where nothing was measured.
        options: the run's options.

    Example:
        >>> plan = liar.plan(model, calib, keep=0.5)
        >>> sorted(plan.memory)
        ['device', 'disk', 'host']
        >>> plan.memory["device"].host > plan.model_bytes
        True
    """

    model: str
    parameters: int
    tokens: int
    dtype: str
    device: str
    model_bytes: int
    memory: Mapping[str, Memory]
    flops: Mapping[str, float]
    seconds: Mapping[str, float] | None
    rates: Rates | None
    options: Mapping[str, Any]

    def to_json(self) -> str:
        """JSON."""
        return json.dumps(asdict(self), indent=1, default=str)

    def __str__(self) -> str:
        """Tables as plain text."""
        on_cpu = self.device == "cpu"
        places = ["host", "disk"] if on_cpu else ["device", "host", "disk"]
        lines = [
            f"{self.model}, {self.parameters / 1e6:,.0f} M parameters in {self.dtype} ({amount(self.model_bytes)}), "
            f"{self.tokens:,} calibration tokens, on {self.device}",
            "",
        ]
        rows = [["activations on", *(f"peak: {place}" for place in places), "when"]]
        for where, need in self.memory.items():
            rows.append([where, *(amount(getattr(need, place)) for place in places), f"{need.stage}: {need.phase}"])
        lines += [*columns(rows), ""]
        rows = [["stage", "G operations", "estimate"]]
        for stage, count in self.flops.items():
            rows.append([stage, f"{count / 1e9:,.0f}", "" if self.seconds is None else duration(self.seconds[stage])])
        total = "" if self.seconds is None else duration(sum(self.seconds.values()))
        rows.append(["together", f"{sum(self.flops.values()) / 1e9:,.0f}", total])
        return "\n".join(lines + columns(rows))


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of cells of equal width; numbers, in all but the first and a last column of words, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def amount(nbytes: float) -> str:
    """Bytes in GB, or MB where they are few."""
    return f"{nbytes / 1e9:,.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.0f} MB"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    name, unit, _ = next(each for each in UNITS if seconds < each[2])
    return f"{seconds / unit:.1f} {name}"


def plan(
    model: nn.Module | PreTrainedConfig | str | Path,
    calib: Iterable[Any] | Calibration | int,
    *,
    keep: float,
    max_length: int = PlanOptions.max_length,
    batch_size: int = PlanOptions.batch_size,
    activations: str | None = PlanOptions.activations,
    offload: bool = PlanOptions.offload,
    measure: bool = PlanOptions.measure,
    criterion: str = SelectOptions.criterion,
    budget: str = SelectOptions.budget,
    widths: str = SelectOptions.widths,
    round_to: int = SelectOptions.round_to,
    protect: Sequence[str | int] = SelectOptions.protect,
    seed: int = SelectOptions.seed,
    heads: str = SelectOptions.heads,
    target: str = ReconstructOptions.target,
    ridge: float | str = ReconstructOptions.ridge,
    refit: bool = ReconstructOptions.refit,
    solver: str = ReconstructOptions.solver,
    bias: str = ReconstructOptions.bias,
    quality: int | str = ReconstructOptions.quality,
    set_aside: bool = ReconstructOptions.set_aside,
    dtype: str = LoadOptions.dtype,
    device: str | None = None,
) -> Plan:
    """Say what `prune` will need with these options: memory, operations and time. Nothing is run, and no weights are needed.

    All sites are taken to keep the same share; where widths are free, memory has room for a site that keeps more. Peaks are
    those of tensors, on a CPU with 15 % of what the run adds for its allocator. The options are those of `prune`, and these:

    `model` is a model, whole or on the meta device; a folder or a name on the hub, of which the configuration alone is read;
    or a configuration of transformers. `calib` are calibration batches, as for `prune`, or a number of tokens of text, in
    full sequences of `max_length` tokens, `batch_size` of them in a batch.

    `activations` says where streams, targets and replayed outputs are kept: `"device"`, `"host"` or `"disk"`; None shows all
    three side by side. With `offload`, weights come to the device one block at a time; those of a model that accelerate has
    offloaded always do. `dtype` is that of the weights where
    `model` is none (`"auto"`: as the configuration says), `device` where it will be computed: where the model is, or the CPU,
    if not given. With `measure`, a second of products is timed there, for the estimate of seconds.

    Returns:
        A `Plan`; `print` shows it as tables.

    Raises:
        OptionError, CalibrationError, CheckpointError, ModelError: the message says what was expected and given.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(num_hidden_layers=4)
        >>> plan = liar.plan(config, 65_536, keep=0.5, max_length=512, dtype="bfloat16", measure=False)
        >>> round(plan.parameters / 1e6), round(plan.model_bytes / 1e9, 1)
        (941, 1.9)
        >>> plan.memory["host"].phase
        'fit, solve'
    """
    selection = SelectOptions(keep, criterion, budget, widths, round_to, protect, seed, heads)
    how = ReconstructOptions(target, ridge, refit, solver, bias, quality, set_aside)
    tokens = calib if isinstance(calib, int) and not isinstance(calib, bool) else 1
    planned = PlanOptions(tokens, max_length, batch_size, activations, offload, measure)
    return plan_with(model, calib, selection, how, planned, LoadOptions(dtype, "auto" if device is None else device))


def plan_with(
    model: nn.Module | PreTrainedConfig | str | Path,
    calib: Iterable[Any] | Calibration | int,
    selection: SelectOptions,
    how: ReconstructOptions,
    planned: PlanOptions,
    load: LoadOptions,
) -> Plan:
    """`plan` with its options in objects."""
    selection, how, planned = selection.checked(), how.checked(), planned.checked()
    load.check()
    if planned.measure and load.device != "auto" and (reason := why_unusable(load.device)):
        raise OptionError(f"device={load.device!r}: torch cannot use it here: {reason}; measure=False plans without seconds")
    if isinstance(model, (str, Path, PreTrainedConfig)):
        model = model_from_config(model, DTYPES.get(load.dtype))
    inner = transformer_in(model)
    layout = layout_of(inner).counted_by(selection.heads)
    first = next(inner.parameters())
    device = _device(inner, load.device)
    offload = planned.offload or load.weights != "device" or is_offloaded(inner)
    data = _data(model, inner, calib, planned)
    kept = kept_units(layout, selection.keep, selection.protect)
    needs = CRITERIA[selection.criterion].needs
    is_free = selection.widths == "free"
    how_weights: dict[str, bool] = {"weights": needs == "gradients", "is_free": is_free, "offload": offload}
    workload = workload_of(inner, layout, data, kept, **how_weights)
    steps, work = phases(workload, selection, how), works(workload, selection, how)
    rates = measure_rates(workload, device, first.dtype) if planned.measure else None
    places = ORDER if planned.activations is None else (planned.activations,)
    on_cpu = device.type == "cpu"
    return Plan(
        model=type(inner).__name__,
        parameters=sum(parameter.numel() for parameter in inner.parameters()),
        tokens=data.tokens,
        dtype=str(first.dtype).removeprefix("torch."),
        device=str(device),
        model_bytes=workload.nbytes,
        memory={place: memory(workload, steps, place, on_cpu=on_cpu, offload=offload) for place in places},
        flops={each.stage: each.flops for each in work},
        seconds=None if rates is None else {each.stage: rates.seconds(each) for each in work},
        rates=rates,
        options={**asdict(selection), **asdict(how), "batch_size": data.batch_sequences, "max_length": data.length},
    )


def _device(model: nn.Module, name: str) -> torch.device:
    """The device of a name, or where a model computes.

    Raises:
        OptionError: torch knows no such device.
    """
    if name == "auto":
        device = compute_device(model)
        return torch.device("cpu") if device.type == "meta" else device
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"device={name!r}: expected a device such as cpu or cuda: {str(error).splitlines()[0]}") from error


def _data(model: nn.Module, inner: nn.Module, calib: Iterable[Any] | Calibration | int, planned: PlanOptions) -> Data:
    if isinstance(calib, (int, float, bool)):
        check_count("tokens", calib)
        return Data.of_count(inner, int(calib), length=int(planned.max_length), batch_size=int(planned.batch_size))
    if not isinstance(calib, Calibration) and compute_device(inner).type == "meta":
        raise OptionError(
            "a model without weights is planned for a number of tokens: pass that in place of calibration batches"
        )
    _, batches = transformer_and_data(model, calib)
    return Data.of_calibration(Calibration.of(batches, inner))
