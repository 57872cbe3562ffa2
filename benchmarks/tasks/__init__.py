"""Tasks: a model, texts to calibrate on, and numbers that say how good a model is. `table.py` says what a task has."""

from __future__ import annotations

from benchmarks.tasks.causal import TINYSTORIES, load_causal
from benchmarks.tasks.encoder import STSB, embed, load_encoder
from benchmarks.tasks.glue import GLUE_TASKS
from benchmarks.tasks.passages import PASSAGES
from benchmarks.tasks.table import SOURCES, Predictions, Task, read

TASKS = {task.name: task for task in (STSB, PASSAGES, *GLUE_TASKS, TINYSTORIES)}

__all__ = ["SOURCES", "TASKS", "Predictions", "Task", "embed", "load_causal", "load_encoder", "read"]
