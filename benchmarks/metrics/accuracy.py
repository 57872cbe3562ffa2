"""Share of the examples whose predicted class is the label."""

from __future__ import annotations

from collections.abc import Sequence

import evaluate
import numpy
from datasets import Features, Value


class Accuracy(evaluate.Metric):  # type: ignore[misc]
    """Predictions and references: one class number per example."""

    def _info(self) -> evaluate.MetricInfo:
        classes = Features({"predictions": Value("int64"), "references": Value("int64")})
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description="", features=classes)

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"accuracy": float(numpy.mean(numpy.asarray(predictions) == numpy.asarray(references)))}
