"""Results on disk: JSON lines, one line per run, with its environment beside the numbers.

A run whose key is in the file is not run again, so a benchmark that was killed continues where it was. One process at a time
writes to a file.
"""

from __future__ import annotations

import json
import os
import platform
import zlib
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import torch

RESULTS = Path(__file__).parent / "results"
Record = dict[str, Any]


def environment() -> Record:
    """What a reader needs to repeat a number: versions, processor, threads."""
    packages = ("torch", "transformers", "numpy", "scipy", "datasets", "liar-prune")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": {name: version(name) for name in packages},
    }


def read_records(path: Path) -> list[Record]:
    """The records of a file, none where there is no file. A last line without its newline was cut off by a kill: left out."""
    # As bytes, since a kill may leave half of a character too.
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def line_of(record: Mapping[str, Any]) -> str:
    """A record as its line in the file: compact, with sorted keys."""
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n"


def packed(values: numpy.ndarray) -> Record:
    """An array as an entry of a record, as small as it goes: numbers as the smallest type that has them exactly."""
    kinds = ("uint8", "uint16", "float32", "float64")
    kind = next(kind for kind in kinds if _is_exact(values.astype(float), kind))
    data = numpy.ascontiguousarray(values.T.astype(f"<{numpy.dtype(kind).str[1:]}")).tobytes()
    return {"type": kind, "shape": list(values.shape), "zlib": b64encode(zlib.compress(data, 9)).decode()}


def _is_exact(values: numpy.ndarray, kind: str) -> bool:
    with numpy.errstate(invalid="ignore", over="ignore"):
        return numpy.array_equal(values.astype(kind).astype(float), values, equal_nan=True)


def unpacked(entry: Mapping[str, Any]) -> numpy.ndarray:
    """The array that `packed` was given."""
    kind = f"<{numpy.dtype(entry['type']).str[1:]}"
    flat: numpy.ndarray = numpy.frombuffer(zlib.decompress(b64decode(entry["zlib"])), kind)
    return flat.reshape(entry["shape"][::-1]).T


class ResultFile:
    """The records of one file, read once and appended to.

    Args:
        path: the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = read_records(path)

    def find(self, **key: Any) -> Record | None:
        """The first record with these entries, if there is one."""
        return next((record for record in self.records if matches(record, key)), None)

    def append(self, record: Mapping[str, Any]) -> Record:
        """Write a record, and return only when it is on the disk. A half-written last line is removed first."""
        line = line_of(record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab+") as file:
            _remove_half_written_line(file)
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        self.records.append(json.loads(line))
        return self.records[-1]

    def get_or_run(self, key: Mapping[str, Any], run: Callable[[], Mapping[str, Any]]) -> Record:
        """The record with this key; if there is none, run, and append the key, the numbers and the environment."""
        record = self.find(**key)
        return self.append({**key, **run(), "environment": environment()}) if record is None else record


def matches(record: Mapping[str, Any], key: Mapping[str, Any]) -> bool:
    """Whether a record has all entries of a key."""
    return all(name in record and record[name] == value for name, value in key.items())


def _remove_half_written_line(file: Any) -> None:
    file.seek(0)
    content: bytes = file.read()
    file.truncate(content.rfind(b"\n") + 1)
