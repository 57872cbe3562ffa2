"""Spearman's rank correlation of predicted scores with the labels."""

from __future__ import annotations

from collections.abc import Sequence

import evaluate
from datasets import Features, Value
from scipy.stats import spearmanr


class Spearman(evaluate.Metric):  # type: ignore[misc]
    """Predictions and references: one number per example."""

    def _info(self) -> evaluate.MetricInfo:
        numbers = Features({"predictions": Value("float64"), "references": Value("float64")})
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description="", features=numbers)

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        return {"spearman": float(spearmanr(predictions, references).statistic)}
