"""How much an error at a site moves the model's output, measured without labels by adding noise there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from liar.calibration import Calibration
from liar.capture import preserved
from liar.outputs import Output, outputs
from liar.sites import Layout, Site, linear
from liar.streams import residual

# Energy of the noise over the energy of the residual stream after the site: small enough to act linearly.
NOISE_ENERGY = 0.05
# A part of the calibration tokens is enough; one batch more is taken until there are so many.
TOKENS = 2048


def sensitivities(model: nn.Module, layout: Layout, calibration: Calibration, progress: bool) -> dict[str, float]:
    """Change of the model's output per relative error in the residual stream after each site.

    The output is what the model's head says: logits, compared by the Kullback-Leibler divergence, or a single number
    (regression), or where there is no head the mean of the last hidden states over each sequence, compared by relative
    squares.

    Args:
        model: with its task head, if it has one.
        layout: its sites.
        calibration: batches; some of them are used.
        progress: show a bar.
    """
    chosen = _some(calibration)
    bar = tqdm(total=len(layout.sites), desc="sensitivity", unit="site", disable=not progress)
    with preserved(model), bar:
        dense = [outputs(model(**batch), keep) for batch, keep in chosen]
        found = {}
        for number, site in enumerate(layout.sites):
            with _noisy(model.get_submodule(site.block), site, number):
                pairs = zip(dense, (outputs(model(**batch), keep) for batch, keep in chosen), strict=True)
                changes = [_change(before, after) for before, after in pairs]
            moved, size = (sum(values) for values in zip(*changes, strict=True))
            # A model that says nothing at all is moved by nothing.
            found[site.name] = moved / NOISE_ENERGY / size if size else 0.0
            bar.update()
    return found


def _some(calibration: Calibration) -> list[tuple[Mapping[str, Any], Tensor]]:
    """Batches spread evenly over the calibration data, which may be sorted by length."""
    wanted = max(1, round(len(calibration.batches) * min(1.0, TOKENS / calibration.tokens)))
    numbers = [round((i + 0.5) * len(calibration.batches) / wanted - 0.5) for i in range(wanted)]
    return [(calibration.batches[number], calibration.keep[number]) for number in numbers]


def _change(before: Sequence[Output], after: Sequence[Output]) -> tuple[float, float]:
    """(how far the outputs of a batch have moved, what to divide it by)."""
    moved, size = zip(*(_moved(old, new) for old, new in zip(before, after, strict=True)), strict=True)
    return sum(moved), sum(size)


def _moved(old: Output, new: Output) -> tuple[float, float]:
    """(how far one output has moved, what to divide it by)."""
    if old.probable:
        return float((old.rows.exp() * (old.rows - new.rows)).sum()), float(len(old.rows))
    return float((old.rows - new.rows).square().sum()), float(old.rows.square().sum())


@contextmanager
def _noisy(block: nn.Module, site: Site, seed: int) -> Iterator[None]:
    """Add noise to what the consumer of a site writes, in proportion to the stream it is added to."""
    point, consumer = residual(block, site), linear(block, site.consumer)
    device = consumer.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    stream: list[Tensor] = []

    def note(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert point.argument is not None
        stream[:] = [args[point.argument]]

    def disturb(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        total = stream[0] + output
        size = (NOISE_ENERGY * total.float().square().mean(-1, keepdim=True)).sqrt()
        noise = torch.randn(output.shape, generator=generator, device=device)
        return output + (size * noise).to(output.dtype)

    handles = [point.module.register_forward_pre_hook(note), consumer.register_forward_hook(disturb)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
