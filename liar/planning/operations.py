"""What a run computes, by stage: floating-point operations by their kind, and bytes that other operations move."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from liar.data import FOLDS
from liar.options import ReconstructOptions, SelectOptions
from liar.planning.memory import DOUBLE, SINGLE, compared_in_a_pass, elimination_tokens, is_plenty
from liar.planning.workload import BlockSize, SiteSize, Workload
from liar.repair.closed_form import ROWS as REFIT_ROWS
from liar.repair.closed_form import TOKENS as REFIT_TOKENS
from liar.repair.comparison import sequences_to_compare
from liar.repair.context import WHOLE
from liar.selection import CRITERIA
from liar.solve.ridge import SKETCH
from liar.statistics.chunks import CHUNK, STRIP

# Ridges that a search tries, usually: where it begins, both neighbours, and one more step.
TRIED = 4


@dataclass(frozen=True)
class Work:
    """Operations of one stage.

    Attributes:
        stage: selection, reconstruction or comparison, and what is done.
        forward: products in the model's own type.
        single: products of statistics, float32.
        double: products of solves, float64.
        factor: factorisations, float64.
        elimination: removing unit after unit, float64.
        traffic: bytes that all else reads and writes.
    """

    stage: str
    forward: float = 0.0
    single: float = 0.0
    double: float = 0.0
    factor: float = 0.0
    elimination: float = 0.0
    traffic: float = 0.0

    @property
    def flops(self) -> float:
        """Of all kinds."""
        return self.forward + self.single + self.double + self.factor + self.elimination


def works(workload: Workload, selection: SelectOptions, options: ReconstructOptions) -> list[Work]:
    """Of a whole `prune`."""
    return [
        *SELECTIONS[CRITERIA[selection.criterion].needs](workload),
        *reconstruction(workload, options),
        comparison(workload, options),
    ]


def dense_forward(workload: Workload, stage: str, tokens: float) -> Work:
    """All blocks on so many tokens."""
    batches = workload.data.batches * tokens / workload.data.tokens
    flops, traffic = (sum(getattr(block, name) for block in workload.blocks) for name in ("flops", "traffic"))
    return Work(stage, forward=batches * flops, traffic=batches * traffic)


def no_selection(_: Workload) -> Iterator[Work]:
    """Weights alone."""
    yield from ()


def channel_selection(workload: Workload) -> Iterator[Work]:
    """One forward pass, and sums over single channels."""
    passes = dense_forward(workload, "selection: forward", workload.data.tokens)
    read = 3 * SINGLE * workload.data.tokens * sum(site.channels for site in workload.sites)
    yield replace(passes, traffic=passes.traffic + read)


def gradient_passes(workload: Workload) -> Iterator[Work]:
    """Forward and back through the whole model."""
    part = workload.gradients
    yield Work(
        "selection: gradient passes", forward=part.passes * (part.forward + part.backward), traffic=part.passes * part.traffic
    )


def curve_selection(workload: Workload) -> Iterator[Work]:
    """Gradients, their products at every site; moments of what all consumers read, and the elimination of their units."""
    yield from gradient_passes(workload)
    outs = sum(site.out**2 for site in workload.sites)
    yield Work("selection: sums of gradients", single=2 * workload.gradients.tokens * outs)
    tokens = elimination_tokens(workload)
    yield dense_forward(workload, "selection: forward", tokens)
    yield summed("selection: moments", [moments(site.channels, 0, tokens) for site in workload.sites])
    yield summed("selection: elimination", [elimination(site) for site in workload.sites])


SELECTIONS = {None: no_selection, "channels": channel_selection, "gradients": gradient_passes, "curves": curve_selection}


def elimination(site: SiteSize) -> Work:
    """The inverse, and three updates of half the sum of squares; the weights in the directions that count, their products."""
    channels, out = site.channels, site.out
    return Work("", elimination=3 * channels**3, double=2 * channels * out * (channels + out), factor=out**3 / 3)


def moments(z: int, t: int, rows: float) -> Work:
    """Of z channels beside t targets: the upper triangle in strips; rows are gathered, sums of chunks added in float64."""
    products = rows * (z * (z + min(STRIP, z)) + 2 * z * t)
    gathered = 4 * SINGLE * rows * (z + t)
    added = (rows / CHUNK) * (z * z / 2 + z * t) * (SINGLE + 2 * DOUBLE)
    return Work("", single=products, traffic=gathered + added)


def fit(z: int, t: int, columns: int, rows: float, *, on_sketch: bool) -> Work:
    """One fit: normal equations, a search for the ridge on a sketch of the outputs, and solves for all of them."""
    splits = 1 if is_plenty(z, rows) else FOLDS
    factors = TRIED * splits + 1
    # For every split: what the weights leave of both parts, a solve, and its error; then the solve on all data. Where the
    # sketch decides, all outputs take part in the last of these alone.
    wide = 4 if on_sketch else 8 * splits + 2
    narrow = splits * (4 + TRIED * 4)
    products = 2 * z**2 * (wide / 2 * columns + narrow / 2 * min(SKETCH, columns))
    shifted = (FOLDS + 5 * splits + 2) * 3 * DOUBLE * z * (z + t)
    # What the weights are compared and combined with.
    weights = 24 * DOUBLE * z * columns
    return Work("", double=products, factor=factors * z**3 / 3, traffic=shifted + weights + factors * 3 * DOUBLE * z**2)


def summed(stage: str, parts: list[Work]) -> Work:
    """Of several works, one stage."""
    names = ("forward", "single", "double", "factor", "elimination", "traffic")
    return Work(stage, **{name: sum(getattr(part, name) for part in parts) for name in names})


def reconstruction(workload: Workload, options: ReconstructOptions) -> Iterator[Work]:
    """A dense and a pruned forward pass, moments and solves."""
    tokens = workload.data.tokens
    yield dense_forward(workload, "reconstruction: dense forward", tokens)
    on_stream, is_damped = options.on_stream, options.target == "damped_stream"
    sums, solves, passes = [], [], []
    for number, block in enumerate(workload.blocks):
        if on_stream:
            passes.append(pruned_forward(workload, block, is_damped=is_damped))
        for place, site in enumerate(block.sites):
            if on_stream and options.refit and (number or place):
                rows = min(max(REFIT_TOKENS, REFIT_ROWS * site.fed), tokens)
                sums.append(moments(site.fed, site.fed, rows))
                # Of a layer that runs whole the producers are refitted whole.
                share = site.share if is_damped and site.kind in WHOLE else 1
                solves.append(fit(site.fed, site.fed, round(site.produced / share), rows, on_sketch=True))
            targets = site.out * (2 if is_damped else 1)
            lacking = Work("", traffic=4 * SINGLE * tokens * targets)
            sums += [moments(site.kept, targets, tokens), lacking]
            solves.append(fit(site.kept, targets, site.out, tokens, on_sketch=False))
            if is_damped:
                solves.append(Work("", double=2 * site.kept**2 * site.out, factor=site.kept**3 / 3))
    if on_stream:
        yield summed("reconstruction: pruned forward", passes)
    yield summed("reconstruction: moments", sums)
    yield summed("reconstruction: solves", solves)


def pruned_forward(workload: Workload, block: BlockSize, *, is_damped: bool) -> Work:
    """Every part of the cut block once, in several passes; for a damped target some layers before their cut."""
    whole = [site for site in block.sites if is_damped and site.kind in WHOLE]
    removed = sum(2 * site.weights * (1 - site.share) * workload.data.batch_positions for site in whole)
    batches = workload.data.batches * (block.share + removed / max(block.flops, 1.0))
    return Work("", forward=batches * block.flops, traffic=batches * block.traffic)


def comparison(workload: Workload, options: ReconstructOptions) -> Work:
    """A few sequences through the dense model, the repaired one and the one with the mask alone."""
    data = workload.data
    count = sequences_to_compare(options.quality, data.sequences)
    batches = count / data.batch_sequences
    share = sum(block.share * block.flops for block in workload.blocks) / max(sum(b.flops for b in workload.blocks), 1.0)
    of_blocks = sum(block.flops for block in workload.blocks)
    _, every = compared_in_a_pass(workload)
    # The mask alone cuts a copy of every block once in each pass.
    numbers = count * (data.length // every) * workload.classes
    flops = batches * (of_blocks * (1 + 2 * share) + 3 * workload.head_flops / every)
    traffic = batches * (1 + 2 * share) * sum(block.traffic for block in workload.blocks) + 24 * SINGLE * numbers
    return Work("comparison", forward=flops, traffic=traffic)
