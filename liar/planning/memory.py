"""What is held at the same time: the parts of every phase of a run, in bytes, by what decides where they are.

A phase is a moment at which something may be at its largest. One function lists the phases of one stage; the peak of a run is
that of the largest phase. Counted are tensors that are kept, and the temporaries that are as large as they.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from liar.data import FOLDS
from liar.options import ReconstructOptions, SelectOptions
from liar.planning.workload import BlockSize, SiteSize, Workload
from liar.repair.closed_form import ROWS as REFIT_ROWS
from liar.repair.closed_form import TOKENS as REFIT_TOKENS
from liar.repair.comparison import NUMBERS, sequences_to_compare
from liar.repair.context import WHOLE
from liar.selection import CRITERIA
from liar.selection.error_curves import ROWS, TOKENS
from liar.solve.ridge import SKETCH
from liar.statistics.chunks import CHUNK
from liar.statistics.folds import HELD_OUT, PLENTY
from liar.statistics.normal import KEPT, KEPT_CHANNELS

SINGLE, DOUBLE = 4, 8
# Matrices [channels, channels] that an elimination has at its largest: the Gram matrix, twice, what is left of inverse and
# products, and the first time that they are made smaller.
ELIMINATION = 6.1
# Copies of the numbers of an output by token that a comparison and its distances have at a time.
COMPARED = 5


@dataclass(frozen=True)
class Phase:
    """What is held at one moment, in bytes.

    Attributes:
        stage: of the run.
        name: what happens then.
        slim: cut copies of the blocks.
        activations: what outlives a batch: streams, targets, inputs, replayed outputs, and how blocks are called.
        work: sums, solves and what one batch needs; always where it is computed.
        batch: bytes of the activations of one batch, which come to the device where they are kept elsewhere.
    """

    stage: str
    name: str
    slim: float = 0.0
    activations: float = 0.0
    work: float = 0.0
    batch: float = 0.0


@dataclass
class Stored:
    """Activations that a walk keeps, in bytes of one batch.

    Attributes:
        dense, pruned: the streams.
        calls: how blocks are called.
        inputs, targets, replays: of every site of the block, by its place.
    """

    dense: float
    pruned: float
    calls: float
    inputs: list[float] = field(default_factory=list)
    targets: list[float] = field(default_factory=list)
    replays: list[float] = field(default_factory=list)

    @property
    def total(self) -> float:
        """All of it."""
        return self.dense + self.pruned + self.calls + sum([*self.inputs, *self.targets, *self.replays])


def selection_phases(workload: Workload, options: SelectOptions) -> Iterator[Phase]:
    """Of collecting what the criterion needs."""
    needs = CRITERIA[options.criterion].needs
    if needs == "channels":
        yield Phase("selection", "moments of channels", work=max(block.peak for block in workload.blocks))
    elif needs == "gradients":
        # Sums over the data of the gradients of all weights, float64.
        sums = DOUBLE * sum(site.weights for site in workload.sites)
        yield Phase("selection", "gradients", work=sums + workload.gradients.peak)
    elif needs == "curves":
        yield from sensitivity_phases(workload)
        yield from elimination_phases(workload)


def sensitivities(workload: Workload) -> dict[str, float]:
    """Products of gradients, float32 [out, out]: those of all sites stay until the last elimination, where activations are."""
    sizes = [float(SINGLE * site.out**2) for site in workload.sites]
    return {"activations": sum(sizes), "batch": max(sizes)}


def sensitivity_phases(workload: Workload) -> Iterator[Phase]:
    """The pass forward and back, beside the sums over it."""
    matrices, gradients = sensitivities(workload), workload.gradients
    yield Phase(
        "selection",
        "gradient pass",
        activations=matrices["activations"] + gradients.entries,
        work=gradients.peak - gradients.entries,
        batch=matrices["batch"],
    )


def elimination_phases(workload: Workload) -> Iterator[Phase]:
    """A walk with the dense stream alone: moments of all sites of a block, then one elimination after the other."""
    share = min(elimination_tokens(workload) / workload.data.tokens, 1.0)
    batches = share * workload.data.batches
    matrices = sensitivities(workload)
    for block in workload.blocks:
        kept = block_stream(workload, block) + workload.calls
        moments = [DOUBLE * site.channels**2 for site in block.sites]
        rows = SINGLE * sum(min(CHUNK, workload.data.tokens * share) * site.channels for site in block.sites)
        work = sum(moments) + rows + block.peak
        common = {"activations": batches * kept + matrices["activations"], "batch": kept + matrices["batch"]}
        yield Phase("selection", "moments of a block", work=work, **common)
        for place, site in enumerate(block.sites):
            waiting = sum(moments[place + 1 :])
            weights = 3 * DOUBLE * site.channels * site.out + 3 * DOUBLE * site.out**2
            # The moments, what they are seen from another mean as, and both selected copies; then the elimination itself.
            own = ELIMINATION * DOUBLE * site.channels**2 + weights
            yield Phase("selection", "elimination", work=waiting + own, **common)


def elimination_tokens(workload: Workload) -> float:
    """Rows that error curves are taken from."""
    widest = max(site.channels for site in workload.sites)
    return float(min(max(TOKENS, ROWS * widest), workload.data.tokens))


def block_stream(workload: Workload, block: BlockSize) -> float:
    """Bytes of the residual stream of one batch."""
    return float(block.element * workload.data.batch_positions * block.sites[0].out)


def reconstruction_phases(workload: Workload, options: ReconstructOptions) -> Iterator[Phase]:
    """The walk that repairs: the streams, what the steps keep of a block; moments and solves of one site after the other."""
    slim = 0.0
    on_stream = options.on_stream
    for number, block in enumerate(workload.blocks):
        slim += slim_bytes(block)
        for phase in (_on_stream if on_stream else _on_layers)(workload, block, options, is_first=number == 0):
            yield Phase(
                "reconstruction", phase.name, slim=slim, activations=phase.activations, work=phase.work, batch=phase.batch
            )


def slim_bytes(block: BlockSize) -> float:
    """Of the new parameters of a cut copy; the others are those of the block."""
    return float(sum(block.element * site.weights * site.share for site in block.sites))


def _on_stream(workload: Workload, block: BlockSize, options: ReconstructOptions, *, is_first: bool) -> Iterator[Phase]:
    """One block, fitted to the dense residual stream on the pruned one."""
    data, batches = workload.data, workload.data.batches
    stream = block_stream(workload, block)
    channel = block.element * data.batch_positions
    is_damped = options.target == "damped_stream"
    kept = Stored(stream, 0.0 if is_first else stream, float(workload.calls))
    for place, site in enumerate(block.sites):
        size = SINGLE * data.batch_positions if workload.pre_norm else 0
        kept.inputs.append((channel * site.fed + size) if options.refit else 0.0)
        # The last sum of a pre-norm block is its stream, and kept once.
        is_stream = workload.pre_norm and place == len(block.sites) - 1
        target = 0.0 if is_stream else channel * site.out
        # For a damped target what attention gives is kept, too.
        kept.targets.append(target + (channel * site.out if is_damped and site.kind not in WHOLE else 0.0))
        kept.replays.append(0.0)

    def phase(name: str, work: float) -> Phase:
        return Phase("", name, activations=batches * kept.total, work=work, batch=kept.total)

    yield phase("dense forward", block.peak)
    # From here on the pruned stream differs from the dense one, but in the first block, which it enters as that.
    for place, site in enumerate(block.sites):
        if options.refit and not (is_first and place == 0):
            rows = min(max(REFIT_TOKENS, REFIT_ROWS * site.fed), data.tokens)
            running = _pass(workload, block, site, site.fed, site.fed)
            yield from (phase(f"refit, {n}", w) for n, w in _fit(site.fed, site.fed, rows, site.produced, running))
        kept.inputs[place] = 0.0
        if site.can_replay:
            kept.replays[place] = channel * site.widest
        out = site.out * (2 if is_damped else 1)
        states = list(_fit(site.widest, out, data.tokens, out, _pass(workload, block, site, site.widest, out)))
        yield phase("fit, " + states[0][0], states[0][1])
        kept.targets[place] = 0.0
        yield from (phase(f"fit, {name}", work) for name, work in states[1:])
        if site.can_replay:
            # From the next pass on what the consumer makes of it.
            kept.replays[place] = channel * site.out
    yield phase("pruned forward", block.peak)


def _on_layers(workload: Workload, block: BlockSize, options: ReconstructOptions, *, is_first: bool) -> Iterator[Phase]:
    """One block whose layers are fitted to their own output: moments of all its sites, then one solve after the other."""
    del options, is_first
    stored = block_stream(workload, block) + workload.calls
    common: dict[str, Any] = {"activations": workload.data.batches * stored, "batch": stored}
    fits = [list(_fit(site.widest, site.out, workload.data.tokens, site.out, block.peak)) for site in block.sites]
    moments = [folds(site.widest, site.out) for site in block.sites]
    rows = [waiting_rows(site.widest, site.out, workload.data.tokens) for site in block.sites]
    yield Phase("", "moments", work=sum(moments) + sum(rows) + block.peak, **common)
    for place, states in enumerate(fits):
        later = sum(moments[place + 1 :]) + sum(rows[place + 1 :])
        yield from (Phase("", f"fit, {name}", work=work + later, **common) for name, work in states[1:])


def folds(z: int, t: int) -> float:
    """Gram and cross moments of every fold, float64: z channels beside t targets."""
    return float(FOLDS * moments(z, t))


def moments(z: int, t: int) -> float:
    """Of one accumulator."""
    return float(DOUBLE * z * (z + t))


def waiting_rows(z: int, t: int, rows: float) -> float:
    """The chunks of every fold that are being filled, float32."""
    return SINGLE * FOLDS * min(CHUNK, ceil(rows / FOLDS)) * (z + t)


def is_plenty(channels: int, rows: float) -> bool:
    """Whether one held-out fold is enough; see `Folds.normals`."""
    return rows >= PLENTY * channels or rows / FOLDS >= HELD_OUT


def _pass(workload: Workload, block: BlockSize, site: SiteSize, z: int, t: int) -> float:
    """A pruned pass that ends at a site, or what it leaves: rows of both kinds and what they lack, and products of a chunk."""
    left = workload.data.batch_positions * (block.element * z + 2 * SINGLE * t) + SINGLE * (CHUNK * t + z * t)
    return max(block.peak * site.widest / site.channels, left)


def _fit(z: int, t: int, rows: float, columns: int, running: float) -> Sequence[tuple[str, float]]:
    """The states of one fit, with the bytes of each: moments beside a running pass, normal equations, solves."""
    one, square = moments(z, t), DOUBLE * z**2
    gathering = folds(z, t) + waiting_rows(z, t, rows) + running
    splits = 1 if is_plenty(z, rows) else FOLDS
    # Of every split the part that is fitted to and that which is held out; beside them all data, and while these are made
    # what they are made of.
    normals = folds(z, t) + (3 * splits + 1) * one
    factors = KEPT * splits + 1 if z <= KEPT_CHANNELS else 1
    # Cholesky factors that are kept, a matrix with its ridge and its factor; weights, their changes and what they leave.
    # A triangular solve copies what it is given.
    solving = folds(z, t) + (2 * splits + 1) * one + (factors + 3) * square
    solving += DOUBLE * z * (7 * columns + 4 * splits * SKETCH)
    return [("moments", gathering), ("normal equations", normals), ("solve", solving)]


def comparison_phases(workload: Workload, options: ReconstructOptions) -> Iterator[Phase]:
    """A few sequences through three models: the numbers of two outputs, and of their distances."""
    data = workload.data
    count = sequences_to_compare(options.quality, data.sequences)
    if not count:
        return
    together, every = compared_in_a_pass(workload)
    together = min(together, count, data.batch_sequences)
    numbers = together * (data.length // every) * workload.classes
    slim = sum(slim_bytes(block) for block in workload.blocks)
    peak = max(block.peak for block in workload.blocks) * together / data.batch_sequences
    # The mask alone cuts a copy of one block at a time.
    cut = max(slim_bytes(block) for block in workload.blocks)
    yield Phase("comparison", "outputs", slim=slim, work=COMPARED * SINGLE * numbers + peak + cut)


def compared_in_a_pass(workload: Workload) -> tuple[int, int]:
    """Sequences in a pass, and every which position; see `comparison._in_passes`."""
    length, classes = workload.data.length, max(workload.classes, 1)
    every = max(length * classes // NUMBERS, 1) if workload.can_leave_out else 1
    return max(NUMBERS * every // (length * classes), 1), every


def phases(workload: Workload, selection: SelectOptions, options: ReconstructOptions) -> list[Phase]:
    """Of a whole `prune`."""
    return [
        *selection_phases(workload, selection),
        *reconstruction_phases(workload, options),
        *comparison_phases(workload, options),
    ]
