"""Who is ahead where several models answer the same examples: differences of a number with their bootstrap intervals.

The error of each score by itself is several times that of their difference, since most examples are easy or hard for both. So
examples are drawn with replacement, the same for all models, and the interval of the difference decides.

    ours, liar = resampled("accuracy", [ours_right]), resampled("accuracy", [liar_right])    # [examples, 1] each
    gap = Gap.between(ours, liar)
    gap.difference, gap.low, gap.high, gap.verdict(more=True)       # verdict: "ahead", "level" or "behind"
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy
from numpy.typing import NDArray

Array = NDArray[numpy.float64]
Verdict = Literal["ahead", "level", "behind"]
RESAMPLES = 1_000
CONFIDENCE = 0.95
# Of a correlation's denominator: below, a column is constant up to rounding.
EPSILON = 1e-12


def mean(weights: Array, values: Array) -> Array:
    """Weighted mean of the only column, NaN without weight: [resamples, examples], [examples, 1] -> [resamples]."""
    total = weights.sum(1)
    means: Array = numpy.divide(weights @ values[:, 0], total, out=numpy.full_like(total, numpy.nan), where=total > 0)
    return means


def perplexity(weights: Array, values: Array) -> Array:
    """Of summed negative log-likelihoods and counts of tokens: [resamples, texts], [texts, 2] -> [resamples]."""
    losses, tokens = (weights @ values).T
    perplexities: Array = numpy.exp(losses / tokens)
    return perplexities


def pearson(weights: Array, x: Array, y: Array) -> Array:
    """Weighted correlation of two columns, 0 where one of them is constant: all [resamples, examples] -> [resamples]."""
    weights = weights / weights.sum(1, keepdims=True)
    x, y = (part - (weights * part).sum(1, keepdims=True) for part in (x, y))
    covariance, *variances = ((weights * one * other).sum(1) for one, other in ((x, y), (x, x), (y, y)))
    scale = numpy.sqrt(variances[0] * variances[1])
    correlation: Array = numpy.divide(covariance, scale, out=numpy.zeros_like(scale), where=scale > EPSILON)
    return correlation


def ranks(weights: Array, values: Array) -> Array:
    """Ranks of values that occur as often as the weights say, ties sharing theirs: [resamples, examples], [examples]."""
    order = values.argsort(kind="stable")
    starts = numpy.flatnonzero(numpy.diff(values[order], prepend=-numpy.inf))
    counts = numpy.add.reduceat(weights[:, order], starts, axis=1)
    return (counts.cumsum(1) - (counts - 1) / 2)[:, numpy.unique(values, return_inverse=True)[1]]


def spearman(weights: Array, values: Array) -> Array:
    """Rank correlation of the two columns: [resamples, examples], [examples, 2] -> [resamples]."""
    return pearson(weights, *(ranks(weights, column) for column in values.T))


def matthews(weights: Array, values: Array) -> Array:
    """Matthews' correlation of predicted and true classes (two of them): [resamples, examples], [examples, 2]."""
    return pearson(weights, *(numpy.broadcast_to(column, weights.shape) for column in values.T))


def mean_of_groups(weights: Array, values: Array) -> Array:
    """Mean over the groups that were drawn of their weighted means: [resamples, examples], [examples, (group, value)]."""
    groups, values = values.T
    parts = [groups == group for group in numpy.unique(groups)]
    means: Array = numpy.nanmean([mean(weights[:, part], values[part, None]) for part in parts], axis=0)
    return means


STATISTICS: Mapping[str, Callable[[Array, Array], Array]] = {
    "accuracy": mean,
    "acc": mean_of_groups,
    "f1": mean,
    "matthews": matthews,
    "perplexity": perplexity,
    "spearman": spearman,
}


@cache
def draws(examples: int) -> Array:
    """How often each example is drawn: once each in the first row, then by chance: [1 + RESAMPLES, examples]."""
    drawn = numpy.random.default_rng(0).multinomial(examples, numpy.full(examples, 1 / examples), size=RESAMPLES)
    return numpy.concatenate([numpy.ones((1, examples)), drawn])


def resampled(number: str, samples: Sequence[Array]) -> Array:
    """A number of one rule: first its value, then that of every resample: [1 + RESAMPLES].

    Args:
        number: one of `STATISTICS`.
        samples: what it is a statistic of, [examples, columns] for every sample of the calibration texts; their mean counts.
    """
    weights = draws(len(samples[0]))
    mean_of_samples: Array = numpy.mean([STATISTICS[number](weights, values.astype(float)) for values in samples], axis=0)
    return mean_of_samples


@dataclass(frozen=True)
class Gap:
    """How far one rule is from another on the same examples.

    Attributes:
        difference: of the number, the one less the other.
        low, high: ends of its interval.
    """

    difference: float
    low: float
    high: float

    @classmethod
    def between(cls, one: Array, other: Array) -> Gap:
        """Of two rules, from what `resampled` gives for each."""
        value, *drawn = one - other
        low, high = numpy.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return cls(float(value), float(low), float(high))

    def verdict(self, *, more: bool) -> Verdict:
        """Of the one: level if the interval has zero in it; otherwise by whether more is better."""
        if self.low <= 0 <= self.high:
            return "level"
        return "ahead" if (self.low > 0) is more else "behind"
