"""Site after site on the pruned model's own stream, so that every site repairs what those before it left.

What a site should add is what the dense model's residual stream is after it, less what the pruned stream is before it
(K-prune's target; "global propagation" in Shin et al. 2024). What the producers read has drifted as well: they are first
fitted to their dense output.

Where the stream grows from block to block (pre-norm), every reader normalises it first: what counts is a token's error
relative to its size, and a few tokens may be hundreds of times larger than the rest. So tokens are weighted by 1 / mean
square. A post-norm block normalises its sums itself; there the weights would only add noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from liar.capture import Point, replaying, run, watching
from liar.rebuild.job import Job, Pair
from liar.sites import Site, linear
from liar.streams import around, residual, sums, token_weight, wide


@dataclass
class _Dense:
    """What the dense model says about one block, [sequences, length, ...] per batch and site.

    `sums`: the residual stream after the site. `inputs`: what its producers read. `lengths`: how many things its mixer
    returns (None: one, by itself). `grows`: whether the block hands on its last sum as it is (pre-norm).
    """

    sums: dict[str, list[Tensor]]
    inputs: dict[str, list[Tensor]]
    lengths: dict[str, int | None] = field(default_factory=dict)
    grows: bool = False


@dataclass
class _Mixed:
    """A repaired site whose mixer need not run again: what its consumer read, per batch."""

    mixer: nn.Module
    consumer: nn.Linear
    inside: bool
    length: int | None
    read: list[Tensor]

    def output(self, number: int) -> Tensor | tuple[Tensor | None, ...]:
        """What the mixer returned for a batch, with the consumer as it is now."""
        value = self.consumer(self.read[number]) if self.inside else self.read[number]
        return value if self.length is None else (value, *[None] * (self.length - 1))


def on_pruned_stream(job: Job, pair: Pair, dense: list[Tensor], pruned: list[Tensor], *, last: bool) -> None:
    """Repair the sites of a block one after the other, and move both streams on."""
    known = _dense_pass(job, pair, dense)
    passes = _Pruned(job, pair, pruned)
    for site in pair.sites:
        drifted = job.changed
        if job.mask.whole(site.name) and not drifted:
            job.repair_consumer(pair, site, None)
            continue
        job.changed = True
        inputs, totals = known.inputs.pop(site.name), known.sums.pop(site.name)
        if job.options.refit and drifted and job.mask.kept(site.name):
            _refit(job, pair, site, passes, inputs)
        del inputs
        _repair(job, pair, site, passes, totals, known)
    if not last:
        passes.move_on(dense)


def _dense_pass(job: Job, pair: Pair, dense: list[Tensor]) -> _Dense:
    """Run the dense block on its own stream and move that on."""
    points = around(pair.block, pair.sites)
    for site in pair.sites:
        points[f"{site.name} read"] = Point(linear(pair.block, site.producers[0]), 0)
        if site.mixer:
            points[f"{site.name} mixed"] = Point(pair.block.get_submodule(site.mixer), None)
    names = [site.name for site in pair.sites]
    known = _Dense({name: [] for name in names}, {name: [] for name in names})
    for number, call in enumerate(pair.calls):
        with job.timed("dense forward"):
            with watching(points) as seen:
                dense[number] = run(pair.block, dense[number], call)
            totals, known.grows = sums(seen, pair.sites, dense[number])
            for name in names:
                known.sums[name].append(totals[name])
                if job.options.refit:
                    known.inputs[name].append(seen[f"{name} read"])
                mixed = seen.get(f"{name} mixed")
                known.lengths[name] = len(mixed) if isinstance(mixed, tuple) else None
    return known


@dataclass
class _Pruned:
    """Passes of the slim block over the pruned stream; mixers of repaired sites replay what they gave."""

    job: Job
    pair: Pair
    hidden: list[Tensor]
    mixed: list[_Mixed] = field(default_factory=list)

    def look(self, number: int, points: dict[str, Point]) -> dict[str, Tensor]:
        """What passes the points for one batch; the block runs no further than needed."""
        with self.job.timed("pruned forward"), self._replayed(number), watching(points, stop_after=len(points)) as seen:
            run(self.pair.student, self.hidden[number], self.pair.calls[number])
        return seen

    def move_on(self, dense: Sequence[Tensor]) -> None:
        """The stream after the block; as long as nothing was cut it is the dense one."""
        for number, call in enumerate(self.pair.calls):
            with self.job.timed("pruned forward"), self._replayed(number):
                changed = self.job.changed
                self.hidden[number] = run(self.pair.student, self.hidden[number], call) if changed else dense[number]

    @contextmanager
    def _replayed(self, number: int) -> Iterator[None]:
        with ExitStack() as stack:
            for mixed in self.mixed:
                stack.enter_context(replaying(mixed.mixer, mixed.output(number)))
            yield


def _refit(job: Job, pair: Pair, site: Site, passes: _Pruned, inputs: Sequence[Tensor]) -> None:
    """Fit the producers to their dense output."""
    folds, points = job.folds(), {"read": Point(linear(pair.student, site.producers[0]), 0)}
    for number, rows in enumerate(job.rows):
        seen = passes.look(number, points)
        with job.timed("statistics"):
            folds.update(rows(seen["read"]), rows(inputs[number]), rows.sizes)
    job.repair_producers(pair, site, folds)


def _repair(job: Job, pair: Pair, site: Site, passes: _Pruned, totals: Sequence[Tensor], known: _Dense) -> None:
    """Fit the consumer to what the site should add, and note what it read if its mixer need not run again."""
    folds, consumer = job.folds(), linear(pair.student, site.consumer)
    points, read = {"z": Point(consumer, 0), "residual": residual(pair.student, site)}, []
    for number, rows in enumerate(job.rows):
        seen = passes.look(number, points)
        with job.timed("statistics"):
            total = wide(rows(totals[number]))
            weight = token_weight(total) if known.grows else None
            folds.update(rows(seen["z"]), total - wide(rows(seen["residual"])), rows.sizes, weight)
        read.append(seen["z"])
    job.repair_consumer(pair, site, folds)
    if site.mixer:
        inside = site.consumer.module.startswith(f"{site.mixer}.")
        passes.mixed.append(_Mixed(pair.student.get_submodule(site.mixer), consumer, inside, known.lengths[site.name], read))
