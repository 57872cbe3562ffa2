"""Token perplexity: exp of the negative log-likelihood per predicted token, over all texts together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import evaluate
from datasets import Features, Value


class Perplexity(evaluate.Metric):  # type: ignore[misc]
    """Predictions: summed negative log-likelihood of each text. References: how many tokens of it were predicted."""

    def _info(self) -> evaluate.MetricInfo:
        sums = Features({"predictions": Value("float64"), "references": Value("int64")})
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description="", features=sums)

    def _compute(self, predictions: Sequence[float], references: Sequence[int]) -> dict[str, float]:
        return {"perplexity": math.exp(math.fsum(predictions) / sum(references))}
