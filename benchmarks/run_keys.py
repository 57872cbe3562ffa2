"""The runs of the grid: what tells them apart, and the order in which they are run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

# The rule of a record that has the dense model's numbers.
DENSE = "dense"


@dataclass(frozen=True)
class Setting:
    """What all rules of one comparison share: one mask, one set of calibration tokens."""

    task: str
    model: str
    criterion: str
    seed: int
    source: str
    keep: float
    tokens: int


@dataclass(frozen=True)
class RunKey:
    """One run: a rule in a setting."""

    setting: Setting
    rule: str

    def entries(self) -> dict[str, str | int | float]:
        """The entries of its record that no other run shares."""
        return {**asdict(self.setting), "rule": self.rule}


def dense_key(task: str, model: str) -> dict[str, str]:
    """The entries that identify the dense model's record."""
    return {"task": task, "model": model, "rule": DENSE}


def grid_file(folder: Path, task: str, model: str) -> Path:
    """The file of all runs of one task and model."""
    return folder / f"{task}-{model}.jsonl"


def settings(
    task: str,
    model: str,
    criterion: str,
    *,
    seeds: int,
    sources: Sequence[str],
    keeps: Sequence[float],
    tokens: Sequence[int],
) -> Iterator[Setting]:
    """All settings, seeds outermost: one seed of everything is there before the second begins."""
    for seed, source, keep, count in product(range(seeds), sources, keeps, tokens):
        yield Setting(task, model, criterion, seed, source, keep, count)
