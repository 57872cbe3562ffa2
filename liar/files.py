"""Single files: written whole or not at all, and paths as users write them."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from liar.errors import CheckpointError, LiarError


def user_path(where: str | PathLike[str]) -> Path:
    """A path that the file system can have; `~` is the home folder, unless something of that name is there.

    Raises:
        CheckpointError: it is none: empty, a loop of links, too long, with characters that no name has.
    """
    try:
        if not str(where):
            raise ValueError("an empty name")
        path = Path(where)
        path = path if path.exists() else path.expanduser()
        # safetensors takes no other names.
        str(path).encode()
        path.resolve()
        path.exists()
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        shown = where if isinstance(where, (str, PathLike)) else type(where).__name__
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{str(shown)[:200]!r}: expected the path of a file or folder: {reason}") from error
    return path


@contextmanager
def replacing_file(where: str | Path) -> Iterator[Path]:
    """Give a new file's path; when the block ends without an error, the file takes its place in one step.

    A kill at any moment leaves the old file or the new one. A symbolic link is followed, and the mode of a file that is
    there stays.

    Raises:
        CheckpointError: the file cannot be written; what was there is as it was.

    Example:
        >>> with replacing_file("notes.txt") as fresh:  # doctest: +SKIP
        ...     fresh.write_text("one line")
    """
    path = user_path(where).resolve()
    if not path.parent.is_dir():
        raise CheckpointError(f"cannot write {where}: there is no folder {path.parent}; make it, or choose another file")
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path  # a pipe, a terminal: nothing is there to be lost
        return
    # Names have a longest length, so the temporary one is not made from the file's; endings say what kind of file it is.
    fresh = path.with_name(f".liar-{secrets.token_hex(4)}{path.suffix[:20]}")
    try:
        fresh.touch()
        # Noted before anything is written, since some writers make files that only their owner may read.
        mode = (path if path.exists() else fresh).stat().st_mode & 0o7777
        yield fresh
        with fresh.open("rb+") as file:
            os.fsync(file.fileno())
        fresh.chmod(mode)
        fresh.replace(path)
    except LiarError:
        raise
    except Exception as error:  # writers of other libraries wrap the system's error, or stumble over it
        reason: BaseException = error
        while not isinstance(reason, OSError) and reason.__context__ is not None:
            reason = reason.__context__
        raise CheckpointError(
            f"cannot write {where}: {getattr(reason, 'strerror', None) or error}; what was there is as it was. Free space, or "
            "choose another file"
        ) from error
    finally:
        fresh.unlink(missing_ok=True)


def write_text(where: str | Path, text: str) -> None:
    """Write a text file whole or not at all; see `replacing_file`."""
    with replacing_file(where) as fresh:
        fresh.write_text(text, encoding="utf-8")
