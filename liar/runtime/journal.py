"""What a run has finished, in a folder: a killed run goes on from there, and the answer is the same.

Every entry is one safetensors file, written whole or not at all. Its name ends with a digest of its content, so that a damaged
one is noticed. `run.json` says which run the entries are of; those of another are refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from liar.errors import CheckpointError, wrap_parse_errors
from liar.files import replacing_file, user_path, write_text

logger = logging.getLogger(__name__)

ABOUT, LOCK, ACTIVATIONS = "run.json", ".lock", "activations"
# Bytes of a digest, and of a file that are read at a time.
DIGEST, CHUNK = 16, 2**22
# Characters of a value that an error message shows.
LONG = 40


class Journal:
    """Entries of one run, by name.

    Args:
        folder: where they are.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, open_journal(folder, {"model": "5f0a"}) as journal:
        ...     journal.commit("block-0000", {"ridge": 0.1, "weight": torch.ones(2)})
        ...     journal.read("block-0000"), journal.read("block-0001")
        ({'ridge': 0.1, 'weight': tensor([1., 1.])}, None)
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def commit(self, name: str, content: Mapping[str, Any]) -> None:
        """Write an entry: tensors, and what JSON can hold, by name. An earlier one of that name is dropped first.

        Raises:
            CheckpointError: it cannot be written; the entries before it are as they were.
        """
        tensors = {key: value.detach().cpu().contiguous() for key, value in content.items() if isinstance(value, Tensor)}
        notes = json.dumps({key: value for key, value in content.items() if key not in tensors})
        data = save(tensors, {"notes": notes})
        digest = hashlib.blake2b(data, digest_size=DIGEST).hexdigest()
        for earlier in self._files(name):
            earlier.unlink()
        with replacing_file(self.folder / f"{name}.{digest}.safetensors") as fresh:
            fresh.write_bytes(data)

    def read(self, name: str) -> dict[str, Any] | None:
        """The content of an entry, its tensors mapped into memory; None if there is none.

        Raises:
            CheckpointError: the entry is damaged.
        """
        found = self._files(name)
        if not found:
            return None
        if len(found) > 1:
            raise _damaged(found[-1], f"there is {found[0].name}, too")
        try:
            if _digest(found[0]) != found[0].name.split(".")[-2]:
                raise _damaged(found[0], "its content is not what was written")
            with safe_open(str(found[0]), framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
                return {**json.loads(file.metadata()["notes"]), **tensors}
        except (OSError, SafetensorError) as error:
            raise _damaged(found[0], f"it cannot be read ({getattr(error, 'strerror', None) or error})") from error

    def _files(self, name: str) -> list[Path]:
        """Of an entry: one, unless something is wrong."""
        return sorted(self.folder.glob(f"{name}.*.safetensors"))

    def names(self) -> list[str]:
        """The entries that are there."""
        return sorted(path.name.rpartition(".")[0].rpartition(".")[0] for path in self.folder.glob("*.*.safetensors"))


@contextmanager
def open_journal(folder: str | PathLike[str], identity: Mapping[str, Any]) -> Iterator[Journal]:
    """The journal of a run in a folder, which is made if it is not there; one process at a time has it.

    Args:
        folder: empty, or with the entries of this run.
        identity: what tells the run from others, as JSON can hold it: digests of the model and of the data, options.

    Raises:
        CheckpointError: the folder holds something else, or the entries of another run, or another process works in it.
    """
    path, lock = user_path(folder), ExitStack()
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.enter_context(FileLock(path / LOCK).acquire(timeout=0))
        with lock:
            _check_identity(path, identity)
            for left in (*path.glob(".liar-*"), *_activation_files(path)):
                left.unlink()  # what a kill has left half done
            lock = lock.pop_all()
    except Timeout as error:
        raise CheckpointError(f"{path}: another process works in this run folder: wait for it, or choose another") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be used as a run folder: {error.strerror or error}") from error
    with lock:
        journal = Journal(path)
        if entries := journal.names():
            logger.info("%s: going on after %d finished entries", path, len(entries))
        yield journal


def remove_journal(folder: str | PathLike[str], verb: str) -> None:
    """Delete what runs of one verb have kept in a run folder, and the folder if nothing else is in it.

    What another process works in stays, and what cannot be deleted: the result is written by then, so neither is an error.
    """
    path = user_path(folder)
    own = path / verb
    if not (own / ABOUT).exists():
        return
    try:
        with FileLock(own / LOCK).acquire(timeout=0):
            for entry in (*own.glob("*.safetensors"), *_activation_files(own), own / ABOUT, own / LOCK):
                entry.unlink(missing_ok=True)
        for each in (own / ACTIVATIONS, own, path):
            if each.is_dir() and not any(each.iterdir()):
                each.rmdir()
    except Timeout:
        logger.info("%s: another process works in this run folder, so it stays", own)
    except OSError as error:
        logger.warning("%s: what the run has kept could not be deleted (%s)", own, error.strerror or error)


def _damaged(entry: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{entry} is damaged: {reason}. Delete the file, and the run goes on from what was finished before it"
    )


def _activation_files(folder: Path) -> list[Path]:
    """Activations, and those that safetensors was writing under another name."""
    return [each for ending in ("*.safetensors", ".tmp*") for each in (folder / ACTIVATIONS).glob(ending)]


def _check_identity(folder: Path, identity: Mapping[str, Any]) -> None:
    """Check that a folder is of this run; of a new one, note that it is."""
    about = folder / ABOUT
    if not about.exists():
        # Both may be left where a run was killed while it deleted its folder.
        others = sorted(
            each.name for each in folder.iterdir() if each.name not in (LOCK, ACTIVATIONS) and each.name[:6] != ".liar-"
        )
        if others:
            raise CheckpointError(
                f"{folder}: expected an empty folder, or one that an earlier run began, got one with {', '.join(others[:4])}: "
                "choose another run folder"
            )
        write_text(about, json.dumps(identity, indent=1, sort_keys=True))
        return
    with wrap_parse_errors(CheckpointError, "what an earlier run noted of itself", about):
        noted = dict(json.loads(about.read_text(encoding="utf-8")))
    here = json.loads(json.dumps(identity))
    if differing := sorted(key for key in noted.keys() | here.keys() if noted.get(key, ...) != here.get(key, ...)):
        shown = ", ".join(_shown(key, noted, here) for key in differing)
        raise CheckpointError(
            f"{folder} is of another run: its {shown} {'differs' if len(differing) == 1 else 'differ'}. Choose "
            "another run folder, or delete this one to begin anew"
        )


def _shown(key: str, noted: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What differs, with both values where they say something: digests do not."""
    values = noted.get(key), here.get(key)
    if not key.startswith("option ") or max(len(json.dumps(value)) for value in values) > LONG:
        return key
    return f"{key} ({json.dumps(values[0])} there, {json.dumps(values[1])} here)"


def _digest(path: Path) -> str:
    """Of a file's content."""
    digest = hashlib.blake2b(digest_size=DIGEST)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
