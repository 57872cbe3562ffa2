"""Child processes, forked from a parent that has imported everything, and what they tell before they die."""

import json
import mmap
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from enum import IntEnum
from importlib import import_module
from pathlib import Path

from liar.io import folders

# Seconds after which a child that hangs ends with another signal than ours.
PATIENCE = 60
UNEXPECTED = 70
TIMES = ("job", "save", "swap")


class Stage(IntEnum):
    """Where a job is."""

    PRUNE = 0  # whatever comes before the save: loading, selecting, repairing
    WRITE = 1
    SYNC = 2
    READY = 3  # what is there is looked at once more
    SWAP = 4
    CLEAN = 5  # the new folder is in its place; the old one is removed
    SAVED = 6  # the report is printed


class Shared:
    """Memory of a child that outlives it: the round and stage in one number, times, and files of an unfinished folder."""

    def __init__(self) -> None:
        """Shared with all children forked later."""
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self._numbers = memoryview(self._memory).cast("q")
        self.ready = 0.0

    def at(self, number: int, stage: Stage) -> None:
        """Note that a round has come to a stage."""
        self._numbers[0] = number * len(Stage) + stage

    @property
    def where(self) -> tuple[int, Stage]:
        """Round and stage."""
        number, stage = divmod(self._numbers[0], len(Stage))
        return number, Stage(stage)

    def took(self, what: str, began: float) -> None:
        """Note how long the latest of something has taken."""
        self._numbers[TIMES.index(what) + 1] = int((time.perf_counter() - began) * 1e9)

    def seconds(self, what: str) -> float:
        """How long the latest of something has taken."""
        return self._numbers[TIMES.index(what) + 1] / 1e9

    @property
    def unfinished(self) -> dict[str, int]:
        """Files that the latest folder held when it was given up, with their sizes."""
        text = self._memory[64:].rstrip(b"\0").decode()
        return json.loads(text) if text else {}

    @unfinished.setter
    def unfinished(self, sizes: dict[str, int]) -> None:
        self._memory[64:] = json.dumps(sizes).encode().ljust(mmap.PAGESIZE - 64, b"\0")

    def watch(self, largest_file: int | None = None) -> None:
        """In a child: note the stages of every save from now on, and limit the size of files while it lasts."""
        run = import_module("liar.cli.run")
        save, sync, swap, rmtree = run.save, folders._sync, folders._swap, shutil.rmtree

        def in_stage(*arguments, **options):
            self.at(self.where[0], Stage.WRITE)
            limit_files(largest_file)
            began = time.perf_counter()
            save(*arguments, **options)
            self.took("save", began)
            self.at(self.where[0], Stage.SAVED)

        def synced(folder):
            self.at(self.where[0], Stage.SYNC)
            sync(folder)
            self.at(self.where[0], Stage.READY)
            self.ready = time.perf_counter()

        def swapped(*arguments):
            self.at(self.where[0], Stage.SWAP)
            swap(*arguments)
            self.at(self.where[0], Stage.CLEAN)
            self.took("swap", self.ready)

        def removed(folder, **options):
            if Path(folder).is_dir():
                self.unfinished = {path.name: path.stat().st_size for path in Path(folder).iterdir()}
            rmtree(folder, **options)

        run.save, folders._sync, folders._swap, shutil.rmtree = in_stage, synced, swapped, removed


def start(work: Callable[[], int], output: int) -> int:
    """Fork a child that does `work`, prints to a file descriptor and ends with the code that `work` gives; its number."""
    sys.stdout.flush()
    sys.stderr.flush()
    number = os.fork()
    if number == 0:
        code = UNEXPECTED
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.alarm(PATIENCE)
            os.dup2(output, 1)
            os.dup2(output, 2)
            code = work()
        except BaseException:  # noqa: BLE001 (whatever it is: it ends here, and the parent reads of it)
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return number


def limit_files(size: int | None) -> None:
    """From now on no file of this process may become larger: writing more is an OSError (Python ignores SIGXFSZ)."""
    if size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def finished(work: Callable[[], int]) -> tuple[int, str]:
    """Let a child do `work` to its end; its code (negative: the signal) and what it printed."""
    # A pipe is no file that a full disk or a limit stops.
    reader, writer = os.pipe()
    number = start(work, writer)
    os.close(writer)
    try:
        with os.fdopen(reader, encoding="utf-8", errors="replace") as pipe:
            output = pipe.read()
    except BaseException:
        os.kill(number, signal.SIGKILL)
        raise
    finally:
        _, status = os.waitpid(number, 0)
    return os.waitstatus_to_exitcode(status), output


def tail(output: str, lines: int = 6) -> str:
    """The end of what a child has printed, where errors are."""
    return "\n".join(output.splitlines()[-lines:])
