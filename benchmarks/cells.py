"""The runs of the ladder: their coordinates, their files, and the order they are run in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path


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
class Cell:
    """One run: a rule in a setting."""

    setting: Setting
    rule: str

    def path(self, folder: Path) -> Path:
        """Its file: all coordinates are in the name."""
        s = self.setting
        name = f"{s.task}-{s.model}-{s.criterion}-keep{s.keep}-tokens{s.tokens}-{s.source}-{self.rule}-seed{s.seed}.json"
        return folder / name

    def coordinates(self) -> dict[str, str | int | float]:
        """As they stand in the file."""
        return {**asdict(self.setting), "rule": self.rule}


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
