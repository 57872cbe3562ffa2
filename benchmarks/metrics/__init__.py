"""Our own metrics as modules of Hugging Face `evaluate`, loaded by path, so that they work without a network."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import evaluate


@cache
def metric(name: str) -> Any:
    """The metric in `metrics/NAME/NAME.py`; it has `compute(predictions=…, references=…)`."""
    return evaluate.load(str(Path(__file__).parent / name / f"{name}.py"))
