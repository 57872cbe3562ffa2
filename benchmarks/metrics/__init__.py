"""Our own metrics, written as metrics of Hugging Face `evaluate`; they need no network."""

from __future__ import annotations

from functools import cache
from typing import Any

from benchmarks.metrics.accuracy import Accuracy
from benchmarks.metrics.agreement_kl import AgreementKl
from benchmarks.metrics.matthews import Matthews
from benchmarks.metrics.perplexity import Perplexity
from benchmarks.metrics.spearman import Spearman
from benchmarks.metrics.squad import Squad

METRICS = {
    "accuracy": Accuracy,
    "agreement_kl": AgreementKl,
    "matthews": Matthews,
    "perplexity": Perplexity,
    "spearman": Spearman,
    "squad": Squad,
}


@cache
def metric(name: str) -> Any:
    """A metric by its name; it has `compute(predictions=…, references=…)`."""
    return METRICS[name]()
