"""Seconds as a cost: the layers of a model are timed at several widths, on the device where the model lies."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from scipy.optimize import isotonic_regression
from torch import nn
from torch.utils.benchmark import Timer
from tqdm.auto import tqdm

from liar import slim
from liar.calibration import Calibration
from liar.capture import Call, block_calls, preserved, run
from liar.costs import LENGTH, Costs
from liar.errors import OptionError
from liar.families import base_and_prefix, checked
from liar.sites import Layout, Site

logger = logging.getLogger(__name__)

# Widths per site, and what they are multiples of where there are enough units.
STEPS, MULTIPLE = 16, 8
# Every width is timed once per round, for at least so many seconds.
ROUNDS, SECONDS = 7, 0.05


def latency(
    model: nn.Module,
    *,
    batch_size: int = 1,
    length: int = LENGTH,
    cache: str | Path | None = None,
    progress: bool = True,
) -> Costs:
    """Time the model and its layers at several widths, as a budget for `select`.

    Each width is timed in a copy of a block in which only that site is cut, and layers of one shape are timed once. Times are
    medians over rounds, each relative to all that was timed in its round, and do not fall as a layer grows. That they add up
    is an assumption; time the slim model to see.

    Args:
        model: a Hugging Face model of a known family, on the device and in the dtype it will run with; it is not changed.
        batch_size: sequences in a batch.
        length: tokens in a sequence.
        cache: JSON file; read if it is there and fits model, device and batch, else written.
        progress: show a bar.

    Returns:
        `Costs` in seconds per batch of the whole model. Sites may keep the widths that were timed.

    Raises:
        ModelError, OptionError, BudgetError: with what was expected, what came, and what to do.

    Example:
        >>> costs = liar.latency(model, batch_size=2, length=16)
        >>> costs.name, costs.about["length"]
        ('seconds', 16)
    """
    layout = checked(model)
    _check_batch(model, batch_size, length)
    about = _about(model, batch_size, length)
    if cache is not None and Path(cache).exists():
        found = Costs.load(cache)
        if found.about == about:
            found.check(layout)
            return found
        logger.info("%s was timed with %s, this is %s: timed anew", cache, dict(found.about), about)
    with preserved(model):
        costs = _timed(model, layout, about, progress)
    if cache is not None:
        costs.save(cache)
    return costs


def _check_batch(model: nn.Module, batch_size: int, length: int) -> None:
    """Whether the model takes such a batch."""
    if batch_size < 1 or length < 1:
        raise OptionError(f"batch_size={batch_size}, length={length}: expected at least 1 sequence of at least 1 token")
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and length > most:
        raise OptionError(
            f"length={length}: {type(model).__name__} takes at most {most} tokens in a sequence; give a smaller length, as in "
            f"budget=liar.latency(model, length={most})"
        )


def _about(model: nn.Module, batch_size: int, length: int) -> dict[str, Any]:
    weight = next(model.parameters())
    device = torch.cuda.get_device_name(weight.device) if weight.is_cuda else weight.device.type
    return {
        "batch_size": batch_size,
        "length": length,
        "device": device,
        "dtype": str(weight.dtype),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _timed(model: nn.Module, layout: Layout, about: Mapping[str, Any], progress: bool) -> Costs:
    base, _ = base_and_prefix(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (about["batch_size"], about["length"]), generator=generator)  # type: ignore[union-attr, arg-type]
    batch = Calibration.of([ids], model).batches[0]
    blocks = [model.get_submodule(name) for name in layout.blocks]
    (hidden,), calls = block_calls(base, blocks, [batch])

    def runner(block: nn.Module, call: Call) -> Callable[[], Any]:
        return lambda: run(block, hidden, call)

    subjects: dict[tuple[str, int], Callable[[], Any]] = {("", 0): lambda: model(**batch)}
    shapes: dict[tuple[Any, ...], Site] = {}
    for site in layout.sites:
        first = shapes.setdefault(_shape(layout, site), site)
        if first is site:
            number = layout.blocks.index(site.block)
            for count in _counts(site):
                cut = slim.student(blocks[number])
                slim.cut_site(cut, site, torch.arange(site.units) < count)
                subjects[site.name, count] = runner(cut, calls[number][0])
    seconds = _seconds(subjects, progress)
    sites = {}
    for site in layout.sites:
        first, counts = shapes[_shape(layout, site)], _counts(site)
        smooth = isotonic_regression([seconds[first.name, count] for count in counts]).x
        sites[site.name] = {count: float(value - smooth[-1]) for count, value in zip(counts, smooth, strict=True)}
    return Costs("seconds", seconds["", 0], sites, about)


def _shape(layout: Layout, site: Site) -> tuple[Any, ...]:
    """What sites have in common that take equally long: their own sizes, and those of the rest of their block."""
    return (site.kind, *((other.units, other.consumer.width, other.out) for other in layout.of_block(site.block)))


def _counts(site: Site) -> list[int]:
    """The numbers of units with which a site is timed."""
    return [count for count in widths(site.units) if count or site.droppable]


def widths(units: int) -> list[int]:
    """A grid of numbers of units, from none to all of them."""
    grid = {round(units * step / STEPS) for step in range(STEPS + 1)}
    if units >= 2 * STEPS * MULTIPLE:
        grid = {count // MULTIPLE * MULTIPLE for count in grid}
    return sorted({*grid, units})


def _seconds(subjects: Mapping[Any, Callable[[], Any]], progress: bool) -> dict[Any, float]:
    """How long each takes: the median over rounds of its share in the round's sum, times the median sum.

    Shares, since machines are slower in some rounds than in others.
    """
    threads = torch.get_num_threads()
    timers = {name: Timer("call()", globals={"call": call}, num_threads=threads) for name, call in subjects.items()}
    numbers = {name: max(1, math.ceil(SECONDS / timer.timeit(1).mean)) for name, timer in timers.items()}
    rounds: list[dict[Any, float]] = []
    with tqdm(total=ROUNDS * len(timers), desc="latency", unit="run", disable=not progress) as bar:
        for _ in range(ROUNDS):
            rounds.append({})
            for name, timer in timers.items():
                rounds[-1][name] = timer.timeit(numbers[name]).mean
                bar.update()
    sums = [sum(found.values()) for found in rounds]
    shares = {name: [found[name] / whole for found, whole in zip(rounds, sums, strict=True)] for name in subjects}
    return {name: median(values) * median(sums) for name, values in shares.items()}
