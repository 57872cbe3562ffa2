"""Calibration texts from a file or a named dataset; `datasets` does the reading."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from liar.errors import CalibrationError
from liar.files import user_path

# By the end of a file's name (before .gz), the builder of `datasets` that reads it.
BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def builder_of(source: str) -> str | None:
    """The builder that reads a file; None where `source` is the name of a dataset.

    Raises:
        CalibrationError: the name is a file's, and there is no such file, or a file's of an unknown kind.

    Example:
        >>> builder_of("wikitext") is None
        True
    """
    path = user_path(source)
    builder, is_file = BUILDERS.get(Path(source.removesuffix(".gz")).suffix), path.is_file()
    is_path = builder or path.is_absolute() or source.startswith((".", "~"))
    if (is_path and not path.exists()) or (builder and not is_file):
        raise CalibrationError(f"calib={source!r}: expected a file with texts, there is none; check the path")
    if not builder and is_file:
        raise CalibrationError(
            f"calib={source!r}: expected a file that ends in {', '.join(BUILDERS)} (also with .gz), or the name of a dataset; "
            "rename or convert the file"
        )
    return builder


def texts(source: str, *, config: str | None = None, split: str = "train", column: str = "text") -> Iterator[Any]:
    """Texts one by one; of a file no more is read than is asked for.

    Args:
        source: a text file (each line is a text; empty lines are passed over later), JSON lines, CSV or Parquet; or the name
            of a dataset.
        config: configuration of a named dataset.
        split: split of a named dataset.
        column: that holds the texts; not used for text files.

    Raises:
        CalibrationError: (on the first or a later text) it cannot be read, or has no such column.

    Example:
        >>> list(texts("notes.txt"))  # doctest: +SKIP
        ['first line', 'second line']
    """
    builder = builder_of(source)
    column = "text" if builder == "text" else column
    try:
        with TemporaryDirectory(prefix="liar-") as folder:
            for row in _rows(source, builder, config, split, Path(folder)):
                if column not in row:
                    raise CalibrationError(
                        f"calib={source!r}: expected a column {column!r} with texts, got {', '.join(row)}; name another column"
                    )
                yield row[column]
    except CalibrationError:
        raise
    except Exception as error:  # datasets raises whatever its builders and file systems raise
        raise CalibrationError(
            f"calib={source!r}: datasets cannot read it ({type(error).__name__}): "
            f"{_sentence(error)}. Files have to be UTF-8; a name that is no file is looked up on the hub: check it"
        ) from error


def _sentence(error: Exception) -> str:
    return str(error).rstrip(". ")


def _rows(source: str, builder: str | None, config: str | None, split: str, folder: Path) -> Any:
    try:
        import datasets  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise CalibrationError(
            f'calib={source!r}: reading texts needs the package datasets, which is not installed: pip install "liar-prune[cli]"'
        ) from error
    if builder:
        name = str(_plainly_named(user_path(source), folder))
        return datasets.load_dataset(builder, data_files=name, split="train", streaming=True)
    return datasets.load_dataset(source, config, split=split)


def _plainly_named(path: Path, folder: Path) -> Path:
    """The file under another name: `datasets` reads names with brackets, stars or colons as patterns and addresses."""
    packed = ".gz" if path.suffix == ".gz" else ""
    link = folder / f"texts{Path(path.name.removesuffix(packed)).suffix}{packed}"
    try:
        os.symlink(path.resolve(), link)
    except OSError:  # Windows, without the right to make links
        shutil.copyfile(path, link)
    return link
