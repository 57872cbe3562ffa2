"""Disks that are full at a random point, while a model folder or a single file is replaced."""

import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from children import Shared, finished, limit_files, tail
from jobs import KEEPS, file_jobs, prune
from tqdm import tqdm
from whole import Expected, Fault, check_model, tree

PAGE = 4096
# In the order in which `save` begins them.
ORDER = (
    "config.json",
    "model.safetensors",
    "tokenizer_config.json",
    "tokenizer.json",
    "mask.json",
    "run.json",
    "report.json",
    "liar.json",
)
PROMISE = "what was there is as it was"
REASONS = {"space": "No space left on device", "inodes": "No space left on device", "file size": "File too large"}


class Full(NamedTuple):
    """How a disk is full: so many pages or inodes are free, or a file may have so many bytes."""

    kind: str
    room: int

    @property
    def largest_file(self) -> int | None:
        """Bytes, where that is the limit."""
        return self.room if self.kind == "file size" else None


class Disks:
    """Full disks, each made anew; faults are noted, since the next disk does not suffer from them."""

    def __init__(self, home: Path, draw: random.Random) -> None:
        """Try what can be done here: mounting a tmpfs needs root, a limit of the size of files works everywhere."""
        self.home, self.draw, self.disk = home, draw, home / "disk"
        self.faults: list[str] = []
        self.kinds = ["file size"]
        with suppress(OSError, subprocess.CalledProcessError), _tmpfs(self.disk, PAGE, 8):
            self.kinds = ["space", "space", "inodes", "file size"]

    def under_a_folder(self, models: Sequence[Expected], disks: int) -> Counter[str]:
        """Replace a model folder; how often each kind was tried, and in which file the disk was full."""
        counts, shared = Counter[str](), Shared()
        for number in tqdm(range(disks), desc="full disks, folder", unit="disk"):
            old, new = self.draw.sample(range(len(KEEPS)), 2)
            sizes = [len(models[new].files[name]) for name in ORDER if name in models[new].files]
            full = self._draw(self.kinds[number % len(self.kinds)], sizes, folders=1)
            shared.unfinished = {}

            def work(out: Path, new: int = new, full: Full = full) -> int:
                shared.watch(full.largest_file)
                return prune(self.home, out, new)

            def check(out: Path, old: int = old) -> None:
                check_model(out, models, {old})

            self._try(f"disk {number + 1} under a folder", full, "slim", models[old].files, work, check)
            counts.update((full.kind, _stopped_at(shared.unfinished, full)))
        return counts

    def under_files(self, slim: Path, disks: int) -> Counter[str]:
        """Replace single files; how often each kind and each file was tried."""
        counts, jobs, sizes = Counter[str](), file_jobs(self.home, slim), {}
        (self.home / "files").mkdir()
        for name, job in jobs.items():
            path = self.home / "files" / name
            code, output = finished(lambda path=path, job=job: job(path))
            if code:
                raise Fault(f"writing {name} undisturbed ended with {code}:\n{tail(output)}")
            sizes[name] = path.stat().st_size
        for number in tqdm(range(disks), desc="full disks, files", unit="disk"):
            name = list(jobs)[number % len(jobs)]
            full = self._draw(self.draw.choice(self.kinds), [sizes[name]], folders=0)
            old = b"what was there before\n" * self.draw.randrange(1, 500)

            def work(path: Path, job: Callable[[Path], int] = jobs[name], full: Full = full) -> int:
                limit_files(full.largest_file)
                return job(path)

            self._try(f"disk {number + 1} under {name}", full, name, old, work, lambda _: None)
            counts.update((full.kind, name))
        return counts

    def _draw(self, kind: str, sizes: Sequence[int], *, folders: int) -> Full:
        """Full somewhere in one of the files, each of which is as likely."""
        file = self.draw.randrange(len(sizes))
        if kind == "space":
            return Full(kind, sum(map(_pages, sizes[:file])) + self.draw.randrange(_pages(sizes[file])))
        if kind == "inodes":
            return Full(kind, self.draw.randrange(folders + len(sizes)))
        return Full(kind, self.draw.randrange(sizes[file]))

    def _try(self, where: str, full: Full, *arguments: Any) -> None:
        try:
            _attempt(self.disk, full, *arguments)
        except Fault as fault:
            self.faults.append(f"{where}, {full.room} free ({full.kind}): {fault}")


def _stopped_at(unfinished: Mapping[str, int], full: Full) -> str:
    """The file that found the disk full, by the sizes of all that were begun: the last one, if it was cut, or the next."""
    last = max((number for number, name in enumerate(ORDER) if name in unfinished), default=-1)
    if last >= 0 and (unfinished[ORDER[last]] % PAGE == 0 or unfinished[ORDER[last]] == full.room):
        return ORDER[last]
    return ORDER[last + 1] if last + 1 < len(ORDER) else "none"


def _pages(size: int) -> int:
    return -(-size // PAGE)


def _attempt(
    disk: Path,
    full: Full,
    name: str,
    old: bytes | Mapping[str, bytes],
    work: Callable[[Path], int],
    check: Callable[[Path], None],
) -> None:
    """Let a child replace a file or folder that is there; it has to say that the disk is full, and to leave what was there."""
    contents = {f"{name}/{file}": content for file, content in old.items()} if isinstance(old, Mapping) else {name: old}
    inodes = len(contents) + (1 if isinstance(old, Mapping) else 0) + 1
    used = sum(_pages(len(content)) for content in contents.values())
    free_pages = full.room if full.kind == "space" else 10_000
    free_inodes = full.room if full.kind == "inodes" else 1000
    with _disk(disk, full, (used + free_pages) * PAGE, inodes + free_inodes):
        for file, content in contents.items():
            (disk / file).parent.mkdir(exist_ok=True)
            (disk / file).write_bytes(content)
        before = tree(disk)
        code, output = finished(lambda: work(disk / name))
        after = tree(disk)
        if before != after:
            names = sorted(file for file in before.keys() | after.keys() if before.get(file) != after.get(file))
            raise Fault(f"what was there has changed: {', '.join(names)}")
        check(disk / name)
        lines = output.splitlines()
        said = " ".join(line for line in lines if line.startswith("Error: "))
        one_paragraph = [said] == lines[-1:] and "Traceback" not in output
        if code != 1 or not one_paragraph or PROMISE not in said or REASONS[full.kind] not in said:
            wanted = f"exit code 1 and one last line 'Error: … {REASONS[full.kind]} … {PROMISE} …'"
            raise Fault(f"expected {wanted}, got exit code {code} and:\n{tail(output)}")


@contextmanager
def _disk(folder: Path, full: Full, size: int, inodes: int) -> Iterator[None]:
    """A file system of a size; an ordinary folder where only the size of files is limited."""
    if full.kind != "file size":
        with _tmpfs(folder, size, inodes):
            yield
        return
    folder.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(folder)


@contextmanager
def _tmpfs(folder: Path, size: int, inodes: int) -> Iterator[None]:
    folder.mkdir()
    try:
        options = f"size={size},nr_inodes={inodes}"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True, capture_output=True)
        try:
            yield
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True, capture_output=True)
    finally:
        folder.rmdir()
