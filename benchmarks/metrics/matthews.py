"""Matthews' correlation of predicted classes with the labels."""

from __future__ import annotations

from collections.abc import Sequence

import evaluate
from datasets import Features, Value
from sklearn.metrics import matthews_corrcoef


class Matthews(evaluate.Metric):  # type: ignore[misc]
    """Predictions and references: one class number per example."""

    def _info(self) -> evaluate.MetricInfo:
        classes = Features({"predictions": Value("int64"), "references": Value("int64")})
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description="", features=classes)

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"matthews": float(matthews_corrcoef(references, predictions))}
