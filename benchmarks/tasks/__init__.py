"""Tasks: a model, texts to calibrate on, and numbers that say how good a model is. `table.py` says what a task has."""

from __future__ import annotations

from benchmarks.tasks.causal import TINYSTORIES, load_causal
from benchmarks.tasks.commonsense import COMMONSENSE_TASKS
from benchmarks.tasks.encoder import STSB, embed, load_encoder
from benchmarks.tasks.glue import GLUE_TASKS
from benchmarks.tasks.passages import PASSAGES
from benchmarks.tasks.squad import SQUAD_TASKS
from benchmarks.tasks.table import SOURCES, Predictions, Task
from benchmarks.tasks.wikitext import WIKITEXT_TASKS

TASKS = {
    task.name: task for task in (STSB, PASSAGES, *GLUE_TASKS, *SQUAD_TASKS, TINYSTORIES, *WIKITEXT_TASKS, *COMMONSENSE_TASKS)
}

__all__ = ["SOURCES", "TASKS", "Predictions", "Task", "embed", "load_causal", "load_encoder"]
