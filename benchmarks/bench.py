"""One run of the grid: a dense model and its predictions, the mask and tokens that the rules of a setting share, one rule."""

from __future__ import annotations

import copy
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import liar
from benchmarks.baselines import RULES, SOLVERS
from benchmarks.results import Record, packed
from benchmarks.run_keys import RunKey, Setting
from benchmarks.selections import SAMPLE_LABELS, SELECTIONS
from benchmarks.tasks import SOURCES, Predictions, Task
from liar.selection import CRITERIA


class Bench:
    """A task's dense model, loaded at most once, and its predictions.

    Args:
        task: what is measured.
        folder: of the model, or its name on the hub; the task's default model if None.
        data_dir: folder of the data; the hub if None.
        device: where everything runs.
        dtype: of the weights; as they were saved if None.
    """

    def __init__(
        self, task: Task, folder: str | None, data_dir: Path | None, device: str = "cpu", dtype: torch.dtype | None = None
    ) -> None:
        self.task, self.folder, self.data_dir, self.device, self.dtype = task, folder, data_dir, device, dtype
        self._statistics: dict[tuple[Any, ...], liar.CriterionStatistics] = {}

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        """(dense model in evaluation mode, tokenizer)."""
        model, tokenizer = self.task.load(self.folder)
        model.train(False)
        if self.dtype is not None:
            # Parameters alone: frequencies of rotary embeddings are buffers, and stay in float32 as in published models.
            for parameter in model.parameters():
                parameter.data = parameter.data.to(self.dtype)
        return nn.Module.to(model, self.device), tokenizer

    @cached_property
    def dense(self) -> Predictions:
        """The dense model's predictions."""
        return self.task.predict(*self.loaded, self.data_dir)

    def statistics(self, setting: Setting, calibration: list[dict[str, Tensor]]) -> liar.CriterionStatistics:
        """The criterion's statistics of a sample of texts: the same for all keep ratios."""
        key = (setting.criterion, setting.seed, setting.source, setting.tokens)
        if key not in self._statistics:
            model, _ = self.loaded
            self._statistics[key] = liar.collect(model, calibration, criteria=[setting.criterion], progress=False)
        return self._statistics[key]

    def score(self, model: nn.Module) -> Record:
        """The numbers of a model, and what the first of them is a statistic of (see `paired.py`)."""
        predictions = self.dense if model is self.loaded[0] else self.task.predict(model, self.loaded[1], self.data_dir)
        scores = self.task.score(predictions, self.dense, self.data_dir)
        return {**scores, "per_example": packed(self.task.examples(predictions, self.data_dir))}


class SharedInputs:
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
            pack=task.pack,
            mixed_lengths=SOURCES[source].mixed_lengths,
        )

    @cached_property
    def mask(self) -> liar.Mask:
        """The mask of the setting."""
        return self.mask_at(self.setting.keep)

    def mask_at(self, keep: float) -> liar.Mask:
        """What the setting's selection gives at a share of the parameters."""
        model, _ = self.bench.loaded
        setting = self.setting
        reusable = setting.criterion in CRITERIA
        data = self.bench.statistics(setting, self.calibration) if reusable else self.calibration
        return SELECTIONS[setting.criterion](model, data, keep, setting.seed)

    def options(self, rule: str) -> dict[str, Any]:
        """What a rule gets besides the model, mask and tokens: its teacher, if that is not the dense model."""
        share = SOLVERS[rule].teacher if rule in SOLVERS else None
        if share is None:
            return {}
        teacher = copy.deepcopy(self.bench.loaded[0])
        liar.remove(teacher, self.mask_at(share(self.setting.keep)))
        return {"teacher": teacher}


def run_rule(key: RunKey, shared: SharedInputs) -> dict[str, Any]:
    """Apply one rule: the numbers, and how long the rule took (selection and evaluation not counted)."""
    dense, _ = shared.bench.loaded
    mask, calibration = shared.mask, shared.calibration
    model, options = copy.deepcopy(dense), shared.options(key.rule)
    began = time.perf_counter()
    RULES[key.rule](model, mask, calibration, **options)
    seconds = time.perf_counter() - began
    layout = liar.discover(dense)
    return {
        **shared.bench.score(model),
        **({"labels": "by sequence"} if key.setting.criterion in SAMPLE_LABELS else {}),
        "achieved": mask.parameters(layout) / layout.parameters,
        "device": shared.bench.device,
        "used_tokens": sum(int(batch["attention_mask"].sum()) for batch in calibration),
        "seconds": seconds,
    }
