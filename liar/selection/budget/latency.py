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

from liar.data import Calibration
from liar.errors import OptionError
from liar.files import user_path
from liar.models import Layout, Site, base_and_prefix, check_kept_here, layout_with_weights
from liar.options import LENGTH, check_count
from liar.progress import Progress, ProgressOption, progress_of
from liar.runtime import ActivationStore, BlockCall, calls_of, exclusive, preserve_model_state, record_block_calls, run_block
from liar.selection.budget.costs import Costs
from liar.surgery import adopt, copy_block, cut_site

logger = logging.getLogger(__name__)

# Widths per site, and what they are multiples of where there are enough units.
STEPS, MULTIPLE = 16, 8
# Every width is timed once per round, for at least so many seconds.
ROUNDS, SECONDS = 15, 0.02
# What is timed beside the blocks: the model as it is, and with about half of all units.
FULL, HALF = "full", "half"


def latency(
    model: nn.Module,
    *,
    batch_size: int = 1,
    length: int = LENGTH,
    cache: str | Path | None = None,
    progress: ProgressOption | Progress = True,
) -> Costs:
    """Time the model and its layers at several widths, as a budget for `select`.

    Each width is timed in a copy of a block in which only that site is cut, and layers of one shape are timed once. Times are
    medians over rounds, each relative to all that was timed in its round, and do not fall as a layer grows. What is saved in
    single blocks is scaled by one factor, so that it adds up for the model with half of all units, which is timed too. That it
    also adds up elsewhere is an assumption: time the pruned model to verify it.

    Args:
        model: a Hugging Face model of a known family, on the device and in the dtype it will run with; it is not changed.
        batch_size: sequences in a batch.
        length: tokens in a sequence.
        cache: JSON file; read if it is there and fits model, device and batch, else written.
        progress: show a bar, or a function that is called in its place (see `ProgressUpdate`).

    Returns:
        `Costs` in seconds per batch of the whole model. Sites may keep the widths that were timed.

    Raises:
        ModelError, OptionError, BudgetError: the message says what was expected and given, and what to do.

    Example:
        >>> costs = liar.latency(model, batch_size=2, length=16)
        >>> costs.name, costs.about["length"]
        ('seconds', 16)
    """
    layout = layout_with_weights(model)
    check_kept_here(
        model, "measured times", "choose a budget in parameters (budget='params'), or time a loaded model of its shape"
    )
    if getattr(model, "main_input_name", "input_ids") != "input_ids" or len(layout.stacks) > 1:
        raise OptionError(
            "latency: expected a model of texts, with one stack of blocks, which is timed with token ids, got a "
            f"{type(model).__name__}: choose a budget in parameters (budget='params')"
        )
    _check_batch(model, batch_size, length)
    about = _about(model, batch_size, length)
    cache = None if cache is None else user_path(cache)
    if cache is not None and cache.exists():
        cached = Costs.load(cache)
        if cached.about == about:
            cached.check(layout)
            return cached
        logger.info("%s was timed with %s, this is %s: timing again", cache, dict(cached.about), about)
    with exclusive(model), preserve_model_state(model):
        try:
            timers = _timers(_subjects(model, layout, about))
        except (RuntimeError, MemoryError) as error:
            raise OptionError(
                f"batch_size={batch_size}, length={length}: such a batch cannot be timed here: {error}"
            ) from error
        with progress_of(progress, "latency", {"latency": 1}) as shown:
            costs = _costs(layout, _seconds(timers, shown), about)
    if cache is not None:
        costs.save(cache)
    return costs


def _check_batch(model: nn.Module, batch_size: int, length: int) -> None:
    """Check that the model takes such a batch."""
    check_count("batch_size", batch_size)
    check_count("length", length)
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


def _subjects(model: nn.Module, layout: Layout, about: Mapping[str, Any]) -> dict[Any, Callable[[], Any]]:
    """What is timed, by `_layer`, and the model and its half."""
    base, _ = base_and_prefix(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (about["batch_size"], about["length"]), generator=generator)  # type: ignore[union-attr, arg-type]
    batch = Calibration.of([ids], model).batches[0]
    blocks = [model.get_submodule(name) for name in layout.blocks]
    store, stream = ActivationStore(), "dense"
    record_block_calls(base, blocks, [batch], store, stream)
    hidden = store.get(stream, 0)

    def runner(block: nn.Module, call: BlockCall) -> Callable[[], Any]:
        return lambda: run_block(block, hidden, call)

    half = _half(model, layout)
    subjects: dict[Any, Callable[[], Any]] = {FULL: lambda: model(**batch), HALF: lambda: half(**batch)}
    for site in layout.sites:
        number = layout.blocks.index(site.block)
        for count in widths(site.units):
            key = _layer(layout, site, count)
            if key not in subjects:
                cut = copy_block(blocks[number])
                cut_site(cut, site, torch.arange(site.units) < count)
                subjects[key] = runner(cut, store.get(calls_of(stream, number), 0))
    return subjects


def _costs(layout: Layout, seconds: Mapping[Any, float], about: Mapping[str, Any]) -> Costs:
    """Costs from the seconds of the model, of its half, and of blocks by `_layer`.

    What single blocks save is scaled to what the half model saves. Where blocks save nothing, there is nothing to scale.
    """
    saved = {site.name: _saved(layout, site, seconds) for site in layout.sites}
    predicted = sum(saved[site.name][_middle(site)] for site in layout.sites)
    scale = max(0.0, (seconds[FULL] - seconds[HALF]) / predicted) if predicted > 0 else 1.0
    sites = {name: {count: 0.0 - scale * gain for count, gain in levels.items()} for name, levels in saved.items()}
    return Costs("seconds", seconds[FULL], sites, about)


def _saved(layout: Layout, site: Site, seconds: Mapping[Any, float]) -> dict[int, float]:
    """Seconds by which a block is faster with so many units of a site; no fewer where fewer units stay."""
    counts = widths(site.units)
    smooth = isotonic_regression([seconds[_layer(layout, site, count)] for count in counts]).x
    return {count: float(smooth[-1] - value) for count, value in zip(counts, smooth, strict=True)}


def _half(model: nn.Module, layout: Layout) -> nn.Module:
    """A copy of a model in which every site keeps about half of its units. Blocks of one shape share their parameters."""
    half, done = copy_block(model), dict[Any, nn.Module]()
    for name in layout.blocks:
        block = half.get_submodule(name)
        for site in layout.of_block(name):
            cut_site(block, site, torch.arange(site.units) < _middle(site))
        adopt(block, done.setdefault(_shape(layout, name), block))
    return half


def _shape(layout: Layout, block: str) -> tuple[Any, ...]:
    """What blocks have in common that take equally long."""
    return tuple((site.kind, site.units, site.consumer.width, site.out) for site in layout.of_block(block))


def _layer(layout: Layout, site: Site, count: int) -> tuple[Any, ...]:
    """What is timed for a site of `count` units: with all of them, it is the same for all sites of a block."""
    return (_shape(layout, site.block), *((site.kind, count) if count < site.units else ()))


def _middle(site: Site) -> int:
    """About half of the units: a number with which the site is timed."""
    counts = widths(site.units)
    return counts[len(counts) // 2]


def widths(units: int) -> list[int]:
    """A grid of numbers of units with which a site is timed, from a few to all of them."""
    grid = {round(units * step / STEPS) for step in range(1, STEPS + 1)}
    if units >= 2 * STEPS * MULTIPLE:
        grid = {count // MULTIPLE * MULTIPLE for count in grid}
    return sorted({*grid, units} - {0})


def _timers(subjects: Mapping[Any, Callable[[], Any]]) -> dict[Any, tuple[Timer, int]]:
    """For each, what times it and how often it runs in a round, from a first run."""
    threads = torch.get_num_threads()
    timers = {name: Timer("call()", globals={"call": call}, num_threads=threads) for name, call in subjects.items()}
    return {name: (timer, max(1, math.ceil(SECONDS / timer.timeit(1).mean))) for name, timer in timers.items()}


def _seconds(timers: Mapping[Any, tuple[Timer, int]], progress: Progress) -> dict[Any, float]:
    """How long each takes: the median over rounds of its share in the round's sum, times the median sum.

    Shares, since machines are slower in some rounds than in others.
    """
    rounds: list[dict[Any, float]] = []
    with progress.stage("latency", ROUNDS * len(timers)) as advance:
        for _ in range(ROUNDS):
            rounds.append({})
            for name, (timer, number) in timers.items():
                rounds[-1][name] = timer.timeit(number).mean
                advance(1)
    sums = [sum(times.values()) for times in rounds]
    shares = {name: [times[name] / total for times, total in zip(rounds, sums, strict=True)] for name in timers}
    return {name: median(values) * median(sums) for name, values in shares.items()}
