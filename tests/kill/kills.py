"""SIGKILL at random moments of `liar prune --force` over a good folder."""

import itertools
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from children import PATIENCE, Shared, Stage, finished, start, tail
from jobs import KEEPS, prune
from tqdm import tqdm
from whole import Expected, Fault, check_model

SAVE = range(Stage.WRITE, Stage.CLEAN + 1)
# Half of the kills are aimed: the save is a part of the job, and the swap an instant of the save.
AIMS = ("job", "save", "job", "swap")
# With fewer kills than this, chance may leave the save out.
ENOUGH = 30


class Kills:
    """A folder over which children write one model after the other until they are killed."""

    def __init__(self, home: Path, models: Sequence[Expected], draw: random.Random) -> None:
        """Write a good model, and measure how long this takes."""
        self.home, self.models, self.draw = home, models, draw
        self.out, self.shared = home / "kills" / "slim", Shared()
        self.current = 0
        self._undisturbed(range(3))

    def run(self, kills: int) -> Counter[str]:
        """Kill, look, and kill again; at the end one job runs undisturbed. What the kills fell on."""
        counts = Counter[str]()
        for number in tqdm(range(kills), desc="kills", unit="kill"):
            first = self._next()
            step, stage = self._kill(first, AIMS[number % len(AIMS)])
            old, new = ((first + step + shift) % len(KEEPS) for shift in (-1, 0))
            allowed = {old} if stage < Stage.SWAP else {old, new} if stage == Stage.SWAP else {new}
            try:
                self.current = check_model(self.out, self.models, allowed)
                beside = self._beside()
                if strange := [name for name in beside if not name.startswith(".liar-")]:
                    raise Fault(f"beside {self.out.name} there is {', '.join(strange)}")
            except Fault as fault:
                raise Fault(f"kill {number + 1}, in stage {stage.name} of job {step + 1} of its child: {fault}") from fault
            counts[stage.name] += 1
            counts["inside"] += stage in SAVE
            counts["beside"] += bool(beside)
            counts["new"] += stage in SAVE and self.current == new
        if kills >= ENOUGH and counts["inside"] * 3 < kills:
            raise Fault(f"only {counts['inside']} of {kills} kills fell inside the save: too few to show anything")
        self._undisturbed([self._next()])
        return counts

    def _next(self) -> int:
        return (self.current + 1) % len(KEEPS)

    def _beside(self) -> list[str]:
        return sorted(path.name for path in self.out.parent.iterdir() if path != self.out)

    def _jobs(self, numbers: Iterable[int]) -> int:
        """In a child: one job after the other; stages and times are noted."""
        self.shared.watch()
        for step, number in enumerate(numbers):
            self.shared.at(step, Stage.PRUNE)
            began = time.perf_counter()
            if code := prune(self.home, self.out, number):
                return code
            self.shared.took("job", began)
        return 0

    def _undisturbed(self, numbers: Sequence[int]) -> None:
        code, output = finished(lambda: self._jobs(numbers))
        if code:
            raise Fault(f"an undisturbed run ended with {code}:\n{tail(output)}")
        self.current = check_model(self.out, self.models, {numbers[-1]})
        if left := self._beside():
            raise Fault(f"an undisturbed run has left {', '.join(left)} beside {self.out.name}")

    def _kill(self, first: int, aim: str) -> tuple[int, Stage]:
        """Start a child and kill it at a random moment; which of its jobs was in which stage."""
        self.shared.at(0, Stage.PRUNE)
        numbers = itertools.islice(itertools.cycle(range(len(KEEPS))), first, None)
        with (self.home / "log.txt").open("w+", encoding="utf-8", errors="replace") as log:
            child = start(lambda: self._jobs(numbers), log.fileno())
            try:
                self._wait(aim)
            finally:
                os.kill(child, signal.SIGKILL)
                _, status = os.waitpid(child, 0)
            if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
                log.seek(0)
                raise Fault(f"a child ended with status {status} before it was killed:\n{tail(log.read())}")
        return self.shared.where

    def _wait(self, aim: str) -> None:
        seconds = self.shared.seconds(aim)
        if aim == "job":
            time.sleep(self.draw.random() * 2 * seconds)
            return
        step = self.draw.randrange(2)
        self._reach((step, Stage.WRITE), pause=0.0005)
        if aim == "save":
            time.sleep(self.draw.random() * seconds)
            return
        self._reach((step, Stage.READY), pause=0)
        end = time.perf_counter() + self.draw.random() * seconds
        while time.perf_counter() < end:
            pass  # nothing else is as exact

    def _reach(self, where: tuple[int, Stage], pause: float) -> None:
        """Wait for a stage; without a pause, to the microsecond."""
        deadline = time.monotonic() + PATIENCE
        while self.shared.where < where and time.monotonic() < deadline:
            if pause:
                time.sleep(pause)
