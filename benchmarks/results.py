"""Results on disk: one JSON per run with its environment beside the numbers, written atomically, skipped if already there."""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)


def environment() -> dict[str, Any]:
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


def kept(path: Path, run: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """The result at `path`; if there is none, run and write it. A run that was killed leaves nothing half-written."""
    if path.exists():
        logger.info("skipped, already there: %s", path)
    else:
        content = {**run(), "environment": environment()}
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        draft.replace(path)
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result
