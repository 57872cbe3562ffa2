"""How far class distributions are from the dense model's: mean KL(dense || model), and how often the top class agrees."""

from __future__ import annotations

import evaluate
import numpy
from datasets import Features, Sequence, Value
from scipy.special import log_softmax


class AgreementKl(evaluate.Metric):  # type: ignore[misc]
    """Predictions and references: logits [examples, classes] of the model and of the dense model."""

    def _info(self) -> evaluate.MetricInfo:
        logits = Features({"predictions": Sequence(Value("float32")), "references": Sequence(Value("float32"))})
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description="", features=logits)

    def compute(self, *, predictions: numpy.ndarray, references: numpy.ndarray) -> dict[str, float]:
        """At once: the base class would first write all distributions to an Arrow file, seconds for a language model's."""
        return self._compute(predictions, references)

    def _compute(self, predictions: numpy.ndarray, references: numpy.ndarray) -> dict[str, float]:
        model, dense = numpy.asarray(predictions, numpy.float32), numpy.asarray(references, numpy.float32)
        agreement = float(numpy.mean(model.argmax(1) == dense.argmax(1)))
        model, dense = log_softmax(model, axis=1), log_softmax(dense, axis=1)
        return {"kl": float((numpy.exp(dense) * (dense - model)).sum(1).mean(dtype=numpy.float64)), "agreement": agreement}
