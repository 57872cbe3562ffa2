"""The runs of the grid: what tells them apart, and the order in which they are run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

# The rule of a record that has the dense model's numbers.
DENSE = "dense"
# The repair after which selections are compared; all of them have been run with it.
SELECTED = "ours_residual_stream"


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


@dataclass(frozen=True)
class Cells:
    """Runs that are asked for together: all combinations of these.

    Attributes:
        criterion: what selects the masks.
        rules: all on the same mask.
        keeps: shares of the block parameters that stay.
        sources: of calibration texts.
        tokens: how many of them.
        seeds: samples of the calibration texts.
    """

    criterion: str
    rules: tuple[str, ...]
    keeps: tuple[float, ...]
    sources: tuple[str, ...] = ("own",)
    tokens: tuple[int, ...] = (16_000,)
    seeds: Sequence[int] = (0,)

    def groups(self, task: str, model: str) -> Iterator[list[RunKey]]:
        """The runs of each setting, seeds outermost: one seed of everything is there before the second begins."""
        for seed, source, keep, count in product(self.seeds, self.sources, self.keeps, self.tokens):
            setting = Setting(task, model, self.criterion, seed, source, keep, count)
            if self.rules:
                yield [RunKey(setting, rule) for rule in self.rules]

    def only(self, **chosen: Sequence[Any] | None) -> Cells:
        """The part with these values of some attributes; None stands for all."""
        parts: dict[str, Any] = {
            name: tuple(value for value in getattr(self, name) if value in values)
            for name, values in chosen.items()
            if values is not None
        }
        return replace(self, **parts)
