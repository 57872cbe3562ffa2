"""How far a run is: one bar for all its stages, with the time left, or a function of the caller's."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


@dataclass(frozen=True)
class ProgressUpdate:
    """How far a run is: what a function given as `progress` is called with.

    The function is called at the beginning and the end of every stage, and as the work goes on, in the thread that does it. An
    exception that it raises stops the run and reaches the caller as it is; the model is then as it was.

    Attributes:
        verb: what was called: `"prune"`.
        stage: what is being done: `"sensitivity"`.
        fraction: share of the whole run's time that is over, from 0 to 1, as estimated beforehand; it never falls.

    Example:
        >>> updates = []
        >>> _ = liar.collect(model, calib, criteria=["wanda"], progress=updates.append)
        >>> updates[0], updates[-1].fraction
        (ProgressUpdate(verb='collect', stage='moments', fraction=0.0), 1.0)
    """

    verb: str
    stage: str
    fraction: float


# False in processes that share a run with the one that shows its bar.
_HAS_BARS: ContextVar[bool] = ContextVar("has_bars", default=True)

# Whether a bar is shown, or the function that is called in its place.
ProgressOption = bool | Callable[[ProgressUpdate], Any]


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
        show: show a bar, or a function that is called in its place.
        rounds: how often all of the stages are gone through.

    Example:
        >>> progress = Progress("prune", {"select": 3, "repair": 2}, show=False)
        >>> with progress.stage("select", steps=2) as advance:
        ...     advance(2)
        >>> progress.done
        3.0
    """

    def __init__(self, verb: str, stages: Mapping[str, float], *, show: ProgressOption, rounds: int = 1) -> None:
        self.done = 0.0
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._verb, self._stages, self._total = verb, dict(stages), rounds * sum(stages.values())
        self._function = show if callable(show) else None
        self._bar = tqdm(
            total=self._total, desc=verb, bar_format=FORMAT, disable=callable(show) or not show or not _HAS_BARS.get()
        )

    @contextmanager
    def stage(self, name: str, steps: float) -> Iterator[Callable[[float], None]]:
        """One of the stages: what it gives is called with the number of steps done since."""
        share, begun = self._stages[name], self.done
        self._bar.set_description_str(self._verb if name == self._verb else f"{self._verb}: {name}")

        def advance(count: float) -> None:
            self._move(name, min(self.done + count * share / steps, begun + share))

        self._move(name, begun)
        yield advance
        # Whatever was not counted, or counted twice.
        self._move(name, begun + share)

    def _move(self, stage: str, done: float) -> None:
        # Sums of shares may come out larger by their rounding.
        done = min(done, self._total)
        self._bar.update(done - self.done)
        self.done = done
        if self._function is not None:
            self._function(ProgressUpdate(self._verb, stage, done / self._total))

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


@contextmanager
def without_bars() -> Iterator[None]:
    """Show no bars inside the body, whatever is asked for; functions are called."""
    token = _HAS_BARS.set(False)
    try:
        yield
    finally:
        _HAS_BARS.reset(token)


@contextmanager
def progress_of(
    progress: ProgressOption | Progress, verb: str, stages: Mapping[str, float], *, rounds: int = 1
) -> Iterator[Progress]:
    """A run's progress: the caller's, whose run has these stages among others, or one of its own."""
    if isinstance(progress, Progress):
        yield progress
        return
    own = Progress(verb, stages, show=progress, rounds=rounds)
    try:
        yield own
    finally:
        own.close()
