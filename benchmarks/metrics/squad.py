"""SQuAD's F1 and exact match by the official rules (Rajpurkar et al. 2018): normalised strings, the best of several answers.

A question without an answer has the empty string as its only one; an empty prediction is right there, and nowhere else.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import evaluate
from datasets import Features, Value
from datasets import Sequence as SequenceOf

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(answer: str) -> str:
    """Lower case, without punctuation and articles, with single spaces."""
    return " ".join(ARTICLES.sub(" ", answer.lower().translate(PUNCTUATION)).split())


def exact_match(prediction: str, answer: str) -> float:
    """1 if both are the same once normalised."""
    return float(normalised(prediction) == normalised(answer))


def f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the words; without any, 1 if both are empty."""
    words, right = normalised(prediction).split(), normalised(answer).split()
    if not words or not right:
        return float(words == right)
    common = (Counter(words) & Counter(right)).total()
    return 2 * common / (len(words) + len(right))


def best(score: Callable[[str, str], float], prediction: str, answers: Sequence[str]) -> float:
    """The score against the answer that fits best. Answers of nothing but articles and punctuation do not count."""
    real = [answer for answer in answers if normalised(answer)]
    return max(score(prediction, answer) for answer in real or [""])


class Squad(evaluate.Metric):  # type: ignore[misc]
    """Predictions: one string per question. References: all its answers."""

    def _info(self) -> evaluate.MetricInfo:
        strings = Features({"predictions": Value("string"), "references": SequenceOf(Value("string"))})
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description="", features=strings)

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        pairs = list(zip(predictions, references, strict=True))
        return {score.__name__: sum(best(score, *pair) for pair in pairs) / len(pairs) for score in (f1, exact_match)}
