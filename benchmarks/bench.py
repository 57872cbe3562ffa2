"""One run of the ladder: a dense model and what it predicts, the mask and tokens a setting's rules share, a rule applied."""

from __future__ import annotations

import copy
import time
from functools import cached_property
from pathlib import Path
from typing import Any

from cells import Cell, Setting
from rivals import RULES
from selections import SELECTIONS
from tasks import SOURCES, Predictions, Task
from torch import Tensor, nn

import liar
from liar.criteria import CRITERIA
from liar.families import discover


class Bench:
    """A task's dense model, loaded at most once, with what it predicts."""

    def __init__(self, task: Task, folder: str | None, data_dir: Path) -> None:
        self.task, self.folder, self.data_dir = task, folder, data_dir
        self._statistics: dict[tuple[Any, ...], liar.Statistics] = {}

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        """(dense model in evaluation mode, tokenizer)."""
        model, tokenizer = self.task.load(self.folder)
        model.train(False)
        return model, tokenizer

    @cached_property
    def dense(self) -> Predictions:
        """What the dense model says."""
        return self.task.predict(*self.loaded, self.data_dir)

    def statistics(self, setting: Setting, calibration: list[dict[str, Tensor]]) -> liar.Statistics:
        """What the criterion looks at in a sample of texts: the same for all keep ratios."""
        key = (setting.criterion, setting.seed, setting.source, setting.tokens)
        if key not in self._statistics:
            model, _ = self.loaded
            self._statistics[key] = liar.collect(model, calibration, criteria=[setting.criterion], progress=False)
        return self._statistics[key]

    def score(self, model: nn.Module) -> dict[str, float]:
        """The numbers of a model."""
        return self.task.score(self.task.predict(model, self.loaded[1], self.data_dir), self.dense, self.data_dir)


class Shared:
    """What all rules of a setting share; made when the first of them runs."""

    def __init__(self, bench: Bench, setting: Setting) -> None:
        self.bench, self.setting = bench, setting

    @cached_property
    def calibration(self) -> list[dict[str, Tensor]]:
        """Batches of the setting's tokens."""
        task, source = self.bench.task, self.setting.source
        return liar.calibration(
            task.texts(self.bench.data_dir, source, self.setting.seed),
            self.bench.loaded[1],
            tokens=self.setting.tokens,
            max_length=task.max_length,
            mixed_lengths=SOURCES[source].mixed_lengths,
        )

    @cached_property
    def mask(self) -> liar.Mask:
        """The mask of the setting."""
        model, _ = self.bench.loaded
        setting = self.setting
        shared = setting.criterion in CRITERIA
        known = self.bench.statistics(setting, self.calibration) if shared else self.calibration
        return SELECTIONS[setting.criterion](model, known, setting.keep, setting.seed)


def run(cell: Cell, shared: Shared) -> dict[str, Any]:
    """One cell: the numbers, the coordinates, and how long the rule took (selection and evaluation not counted)."""
    dense, _ = shared.bench.loaded
    mask, calibration = shared.mask, shared.calibration
    model = copy.deepcopy(dense)
    began = time.perf_counter()
    RULES[cell.rule](model, mask, calibration)
    seconds = time.perf_counter() - began
    layout = discover(dense)
    return {
        **shared.bench.score(model),
        **cell.coordinates(),
        "got": mask.parameters(layout) / layout.parameters,
        "got_tokens": sum(int(batch["attention_mask"].sum()) for batch in calibration),
        "seconds": seconds,
    }
