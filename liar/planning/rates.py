"""How fast this machine is, measured in a second or two: products in the types that a run uses, factorisations, traffic."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from liar.planning.operations import Work
from liar.planning.workload import Workload
from liar.selection import eliminate
from liar.selection.error_curves import RIDGE
from liar.statistics.chunks import CHUNK, STRIP

# Sizes that are timed at most: larger ones are as fast.
LARGEST, LARGEST_FACTOR, LARGEST_ELIMINATION = 4_096, 1_024, 1_024
ROWS = 2_048
# Each is timed until so many seconds have passed, at least so often; the fastest counts, as the least disturbed.
SECONDS, LEAST = 0.2, 3
# Numbers of the tensors whose traffic is timed: as many as a batch has.
NUMBERS = 2**20


@dataclass(frozen=True)
class Rates:
    """Operations, or for traffic bytes, per second; the names are those of `Work`."""

    forward: float
    single: float
    double: float
    factor: float
    elimination: float
    traffic: float

    def seconds(self, work: Work) -> float:
        """How long some work takes."""
        return float(sum(getattr(work, name) / rate for name, rate in vars(self).items()))


def measure_rates(workload: Workload, device: torch.device, dtype: torch.dtype) -> Rates:
    """Time real products of the shapes of a workload."""
    widest = max(workload.sites, key=lambda site: site.channels)
    kept = max(site.kept for site in workload.sites)
    rows = min(workload.data.batch_positions, ROWS)
    fed, channels = min(widest.fed, LARGEST), min(widest.channels, LARGEST)

    def random(*shape: int, dtype: torch.dtype) -> Tensor:
        # 16-bit types have no generator of their own everywhere.
        return torch.randn(*shape, device=device).to(dtype)

    x, weight = random(rows, fed, dtype=dtype), random(fed, channels, dtype=dtype)
    z = random(CHUNK, channels, dtype=torch.float32)
    strip = z[:, :STRIP]
    factor = min(max(kept, STRIP), LARGEST_FACTOR)
    a = random(factor, factor, dtype=torch.float64)
    gram = a @ a.T + torch.eye(factor, dtype=torch.float64, device=device)
    size = min(max(widest.channels, STRIP), LARGEST_ELIMINATION)
    b = random(2 * size, size, dtype=torch.float64)
    squares, narrow = b.T @ b, random(size, 8, dtype=torch.float64)
    numbers, others = random(NUMBERS, dtype=torch.float32), random(NUMBERS, dtype=torch.float32)
    timed: Mapping[str, tuple[float, Callable[[], object]]] = {
        "forward": (2.0 * rows * fed * channels, lambda: x @ weight),
        "single": (2.0 * CHUNK * strip.shape[1] * channels, lambda: strip.T @ z),
        "double": (2.0 * factor**3, lambda: a @ gram),
        "factor": (factor**3 / 3.0, lambda: torch.linalg.cholesky_ex(gram)),
        "elimination": (3.0 * size**3, lambda: eliminate(squares, narrow, size, RIDGE)),
        "traffic": (5.0 * numbers.nbytes, lambda: torch.nn.functional.silu(numbers) * others),
    }
    with torch.inference_mode():
        return Rates(**{name: amount / fastest(run, device) for name, (amount, run) in timed.items()})


def fastest(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several runs, after one that does not count."""
    # What others take of the processor does not count, where that can be told apart.
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    run()
    times: list[float] = []
    while len(times) < LEAST or sum(times) < SECONDS:
        _wait(device)
        began = clock()
        run()
        _wait(device)
        times.append(clock() - began)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
