"""Our own metrics, written as metrics of Hugging Face `evaluate`; they need no network."""

from __future__ import annotations

from functools import cache
from typing import Any

from benchmarks.metrics.accuracy import Accuracy
from benchmarks.metrics.agreement_kl import AgreementKl
from benchmarks.metrics.perplexity import Perplexity
from benchmarks.metrics.spearman import Spearman

METRICS = {"accuracy": Accuracy, "agreement_kl": AgreementKl, "perplexity": Perplexity, "spearman": Spearman}


@cache
def metric(name: str) -> Any:
    """A metric by its name; it has `compute(predictions=…, references=…)`."""
    return METRICS[name]()
