"""Model folders: what may be replaced, and writing one whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from liar.errors import CheckpointError
from liar.files import user_path

# Files that `save_pretrained` of models and tokenizers writes, and those of this library. What a folder holds besides is the
# user's, unless its liar.json says that `save` wrote it.
WRITTEN = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "liar.json",
    "modeling_pruned.py",
)
# model.safetensors, model.fp16-00001-of-00002.safetensors, pytorch_model.bin.index.json, …
WEIGHTS = re.compile(r"(pytorch_)?model(\.\w+)?(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index(\.\w+)?\.json)?")
# Further chat templates of a tokenizer, *.jinja.
TEMPLATES = "additional_chat_templates"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give an empty folder; when the block ends without an error, what it holds is what `target` holds.

    Whoever looks at `target`, at whatever moment this process is killed, finds the old model or the new one. The new folder
    is made beside `target`, and on Linux the two change places in one system call. Where there is none (macOS, Windows, some
    network file systems) two renames do it: a kill between them leaves the old folder beside `target` under a hidden name
    that ends in "-old". A `target` that cannot be renamed (a mounted volume, the current folder) has to be empty, and is
    filled with config.json last: before that it is no model's folder.

    What killed runs leave behind is hidden, harmless, and removed by the next successful call for the same target.

    Args:
        target: the folder to write; its parents are made. A symbolic link is followed. Its mode and owner stay.

    Raises:
        CheckpointError: it holds what must not be replaced.
        OSError: the disk is full, the place may not be written to; `target` is then as it was.

    Example:
        >>> with replacing(Path("model")) as fresh:  # doctest: +SKIP
        ...     (fresh / "config.json").write_text("{}")
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    inside = _is_fixed(target)
    fresh = (target if inside else target.parent) / f"{_prefix(target)}{secrets.token_hex(4)}"
    fresh.mkdir()
    held = _lock(fresh)
    try:
        yield fresh
        _like(fresh, target)
        _sync(fresh)
        # Looked at before the work as well; something may have been put there since.
        _check_replaceable(target)
        if inside:
            _fill(fresh, target)
        else:
            _swap(fresh, target)
        _sync_folder(target.parent)
        _clean(fresh.parent, target)
    finally:
        # Before the swap this is the unfinished folder, after it the old one.
        shutil.rmtree(fresh, ignore_errors=True)
        if held is not None:
            os.close(held)


def check_target(folder: str | Path, *, overwrite: bool) -> None:
    """Check, before any work is done, that a model folder may be written to a place.

    Raises:
        CheckpointError: it holds something, and `overwrite` is False or not all of it was written by `save` or
            `save_pretrained`; or nothing can be written there.
    """
    path = user_path(folder).resolve()
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{folder}: expected a folder, or nothing yet, got a file; choose another name")
    written = path if _is_fixed(path) else next(parent for parent in path.parents if parent.exists())
    if not written.is_dir() or not os.access(written, os.W_OK | os.X_OK):
        raise CheckpointError(f"{folder}: expected a place that can be written to, {written} cannot; choose another folder")
    if not path.exists() or not _content(path):
        return
    if not overwrite:
        raise CheckpointError(
            f"{folder} is there already and not empty; choose another folder, or allow to overwrite it (overwrite=True, "
            "--force)"
        )
    _check_replaceable(path)


def _check_replaceable(path: Path) -> None:
    """Check that a folder is empty, or holds a model and nothing else."""
    if not path.exists() or not _content(path):
        return
    if _is_fixed(path):
        raise CheckpointError(
            f"{path}: a model there cannot be replaced in one step, since the folder cannot be renamed (it is the current "
            "folder, a mounted volume, or its parent may not be written to): empty it, or choose another folder"
        )
    if not _is_model(path):
        raise CheckpointError(
            f"{path}: expected a model folder (with the config.json of a model) or an empty one, got a folder with other "
            "files. Saving replaces the whole folder and would remove them: choose another folder, or empty this one"
        )
    foreign = foreign_names(path)
    if foreign:
        shown = ", ".join(foreign[:5]) + (", …" if len(foreign) > 5 else "")
        raise CheckpointError(
            f"{path}: expected a folder with one model and nothing else, got one that also holds {shown}. Saving replaces the "
            "whole folder and would remove that: choose another folder, or move it away"
        )


def foreign_names(path: Path) -> list[str]:
    """What a folder holds that neither `save` nor `save_pretrained` has written."""
    listed = _read(path / "liar.json").get("files")
    own = set(map(str, listed)) if isinstance(listed, list) else set()

    def is_own(child: Path) -> bool:
        if child.name == TEMPLATES and child.is_dir():
            return all(inside.is_file() and inside.suffix == ".jinja" for inside in child.iterdir())
        if child.is_dir() and not child.is_symlink():
            inside = {f"{child.name}/{name}" for name in files_in(child)}
            return bool(inside) and inside <= own
        return child.is_file() and (child.name in own or child.name in WRITTEN or WEIGHTS.fullmatch(child.name) is not None)

    return sorted(child.name for child in _content(path) if not is_own(child))


def files_in(path: Path) -> set[str]:
    """What is in a folder and the folders in it but for folders, by name from there."""
    return {child.relative_to(path).as_posix() for child in path.rglob("*") if not child.is_dir() or child.is_symlink()}


def _is_model(path: Path) -> bool:
    # An interrupted run that filled a folder in place has written liar.json first.
    return "model_type" in _read(path / "config.json") or "sites" in _read(path / "liar.json")


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, {} where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _content(path: Path) -> list[Path]:
    """What is in a folder, but for unfinished folders of ours."""
    return [child for child in path.iterdir() if not _is_ours(child, _prefix(path))]


def check_file(path: Path, *, overwrite: bool) -> None:
    """Check, before any work is done, that a file may be written to a place.

    Raises:
        CheckpointError: something is there that must not be replaced, or there is no folder to put it in.
    """
    path = user_path(path)
    if path.is_dir() or (path.exists() and not overwrite):
        raise CheckpointError(f"{path} is there already; choose another name, or allow to replace a file (--force)")
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: there is no folder {path.parent}; make it, or choose another name")


def _is_fixed(target: Path) -> bool:
    """Whether a folder is there and cannot be renamed, or must not be, since this process is in it."""
    if not target.is_dir():
        return False
    here = Path.cwd().resolve()
    return target == here or target in here.parents or target.is_mount() or not os.access(target.parent, os.W_OK | os.X_OK)


def _prefix(target: Path) -> str:
    # Not the name itself: with more before it, it may be longer than a name can be.
    return f".liar-{sha256(os.fsencode(target.name)).hexdigest()[:8]}-"


def _is_ours(path: Path, prefix: str) -> bool:
    """Whether this is an unfinished or old folder of an earlier call; nobody else gives such a name."""
    named = re.fullmatch(re.escape(prefix) + r"[0-9a-f]{8}(-old)?", path.name) is not None
    return named and path.is_dir() and not path.is_symlink()


def _like(fresh: Path, target: Path) -> None:
    """Give the new folder the mode and owner of the old one, and its files those that the folder's allow."""
    made = fresh.stat()
    old = target.stat() if target.is_dir() else made
    for path in fresh.rglob("*"):
        # Some writers make files that only their owner may read.
        path.chmod(made.st_mode & (0o777 if path.is_dir() else 0o666))
    for path in (fresh, *fresh.rglob("*")):
        if (old.st_uid, old.st_gid) != (made.st_uid, made.st_gid):
            with suppress(OSError):  # only root may give files away
                os.chown(path, old.st_uid, old.st_gid)
    fresh.chmod(old.st_mode & 0o7777)


def _fill(fresh: Path, target: Path) -> None:
    """Move files into an empty folder, config.json last: until then it is no model's folder."""
    order = {"liar.json": 0, "config.json": 2}
    moved = []
    try:
        for path in sorted(fresh.iterdir(), key=lambda path: order.get(path.name, 1)):
            moved.append(path.rename(target / path.name))
    except BaseException:
        for path in moved:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        raise
    _sync_folder(target)


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
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    with suppress(PermissionError):  # a parent that may be searched but not read
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _clean(folder: Path, target: Path) -> None:
    """Remove what killed runs left; a folder that another process is filling right now is locked, and stays."""
    for path in folder.iterdir():
        if _is_ours(path, _prefix(target)):
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
