"""Token perplexity: exp of the negative log-likelihood per predicted token, over all texts together; and its standard error.

The error is that of a ratio of sums over independent texts, to first order (Cochran 1977, section 2.11).
"""

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
        texts, tokens = len(references), sum(references)
        mean = math.fsum(predictions) / tokens
        squares = math.fsum((loss - mean * count) ** 2 for loss, count in zip(predictions, references, strict=True))
        error = math.sqrt(squares * texts / (texts - 1)) / tokens if texts > 1 else math.nan
        return {"perplexity": math.exp(mean), "perplexity_error": math.exp(mean) * error}
