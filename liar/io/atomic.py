"""Where files and folders may be written, and a folder whole or not at all: filled beside its place, put there in one step."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from liar.errors import CheckpointError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give an empty folder beside `target`; when the block ends without an error it takes the place of `target`.

    Whoever looks at `target`, at whatever moment this process is killed, finds the old folder or the new one. On Linux
    the two change places in one system call. Where there is none (macOS, Windows, some network file systems) two renames
    do it: a kill between them leaves the old folder under a hidden name beside `target`, `.<name>.liar-<digits>-old`.

    What killed runs leave behind is hidden, harmless, and removed by the next successful call for the same target.

    Args:
        target: the folder to write; its parents are made. A symbolic link is followed.

    Raises:
        OSError: the disk is full, the place may not be written to; `target` is then as it was.

    Example:
        >>> with replacing(Path("model")) as fresh:  # doctest: +SKIP
        ...     (fresh / "config.json").write_text("{}")
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f"{_prefix(target)}{secrets.token_hex(4)}")
    fresh.mkdir()
    held = _lock(fresh)
    try:
        yield fresh
        _sync(fresh)
        _swap(fresh, target)
        _sync_folder(target.parent)
        _clean(target)
    finally:
        # Before the swap this is the unfinished folder, after it the old one.
        shutil.rmtree(fresh, ignore_errors=True)
        if held is not None:
            os.close(held)


def check_target(folder: str | Path, *, overwrite: bool) -> None:
    """Check, before any work is done, that a model folder may be written to a place.

    Raises:
        CheckpointError: it holds something, and `overwrite` is False or it is not one model's folder.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{folder}: expected a folder, or nothing yet, got a file; choose another name")
    if not path.exists() or not any(path.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(
            f"{folder} is there already and not empty; choose another folder, or allow to overwrite it (--force)"
        )
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: expected a model folder (with config.json) or an empty one, got a folder with other files. Saving "
            "replaces the whole folder and would remove them: choose another folder, or empty this one"
        )
    inside = sorted(child.name for child in path.iterdir() if child.name == ".git" or any(child.glob("**/config.json")))
    if inside:
        raise CheckpointError(
            f"{folder}: expected a folder with one model, got one that also holds {', '.join(inside)}. Saving replaces the "
            "whole folder and would remove that: choose another folder"
        )


def check_file(path: Path, *, overwrite: bool) -> None:
    """Check, before any work is done, that a file may be written to a place.

    Raises:
        CheckpointError: something is there that must not be replaced, or there is no folder to put it in.
    """
    if path.is_dir() or (path.exists() and not overwrite):
        raise CheckpointError(f"{path} is there already; choose another name, or allow to replace a file (--force)")
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: there is no folder {path.parent}; make it, or choose another name")


def _prefix(target: Path) -> str:
    return f".{target.name}.liar-"


def _swap(fresh: Path, target: Path) -> None:
    if not target.exists():
        fresh.rename(target)
    elif not _exchange(fresh, target):
        old = fresh.with_name(f"{fresh.name}-old")
        target.rename(old)
        try:
            fresh.rename(target)
        except BaseException:
            old.rename(target)
            raise
        old.rename(fresh)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _sync(folder: Path) -> None:
    """Wait until every file is on the disk: a rename may otherwise outlive the contents in a power cut."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        else:
            _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _clean(target: Path) -> None:
    """Remove what killed runs left; a folder that another process is filling right now is locked, and stays."""
    for path in target.parent.iterdir():
        if path.name.startswith(_prefix(target)) and path.is_dir():
            held = _lock(path)
            if held is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(held)


def _lock(folder: Path) -> int | None:
    """A handle that locks a folder until it is closed or the process ends; None if it is locked or cannot be."""
    if os.name != "posix":
        return None
    import fcntl  # noqa: PLC0415 (POSIX only)

    handle = None
    try:
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if handle is not None:
            os.close(handle)
        return None
    return handle
