"""One progress bar for all stages of a run, with the time left."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from tqdm.auto import tqdm

FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


@contextmanager
def timed(seconds: defaultdict[str, float], work: str) -> Iterator[None]:
    """Add the time of the body to what a kind of work has taken so far."""
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds[work] += time.perf_counter() - began


class Progress:
    """Where a run stands, and where its time went: `seconds`, by kind of work.

    Args:
        verb: what the user asked for.
        stages: what is done for it, in order: name -> share of the time, in any unit.
        show: show a bar.

    Example:
        >>> progress = Progress("prune", {"select": 3, "repair": 2}, show=False)
        >>> with progress.stage("select", steps=2) as advance:
        ...     advance(2)
        >>> progress.done
        3.0
    """

    def __init__(self, verb: str, stages: Mapping[str, float], *, show: bool) -> None:
        self.done = 0.0
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._verb, self._stages = verb, dict(stages)
        self._bar = tqdm(total=sum(stages.values()), desc=verb, bar_format=FORMAT, disable=not show)

    @contextmanager
    def stage(self, name: str, steps: float) -> Iterator[Callable[[float], None]]:
        """One of the stages: what it gives is called with the number of steps done since."""
        share, begun = self._stages[name], self.done
        self._bar.set_description_str(self._verb if name == self._verb else f"{self._verb}: {name}")

        def advance(count: float) -> None:
            self._move(self.done + count * share / steps)

        yield advance
        # Whatever was not counted, or counted twice.
        self._move(begun + share)

    def _move(self, done: float) -> None:
        # Sums of shares may come out larger by their rounding.
        done = min(done, sum(self._stages.values()))
        self._bar.update(done - self.done)
        self.done = done

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


@contextmanager
def progress_of(progress: bool | Progress, verb: str, stages: Mapping[str, float]) -> Iterator[Progress]:
    """A run's progress: the caller's, whose run has these stages among others, or one of its own."""
    if isinstance(progress, Progress):
        yield progress
        return
    own = Progress(verb, stages, show=progress)
    try:
        yield own
    finally:
        own.close()
