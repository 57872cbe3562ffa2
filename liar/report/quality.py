"""How close the output of the finished model is to the dense model's, beside that of the mask alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isnan

from liar.verdicts import OutputVerdict

# A Kullback-Leibler divergence, or a distance of a cosine from 1, that is rounding and nothing else.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Metric:
    """One way to compare outputs.

    Attributes:
        label: its name for people.
        text: what it is.
        perfect: its value for equal outputs, the best there is.
        leads: whether it decides that a repair is better: it has to come nearer to `perfect`; others must not get worse.
        shown: how a value is written.
    """

    label: str
    text: str
    perfect: float
    leads: bool
    shown: str

    def loss(self, value: float) -> float:
        """Distance from the best value; NaN stays NaN."""
        return abs(value - self.perfect)

    def show(self, value: float) -> str:
        """A value as text, without rounding noise around the best one."""
        return self.shown.format(self.perfect if self.loss(value) <= ROUNDING else value)


METRICS: Mapping[str, Metric] = {
    "kl": Metric(
        "KL divergence",
        "Kullback-Leibler divergence of the predictions from the dense model's, in nats, mean over predictions: 0 is the same",
        perfect=0.0,
        leads=True,
        shown="{:.4g}",
    ),
    "agreement": Metric(
        "agreement",
        "share of predictions (the most likely class or token) that are the dense model's",
        perfect=1.0,
        leads=False,
        shown="{:.1%}",
    ),
    "cosine": Metric(
        "cosine",
        "cosine similarity with the dense model's vectors, one for each sequence, mean over sequences: 1 is the same direction",
        perfect=1.0,
        leads=True,
        shown="{:.4f}",
    ),
    "difference": Metric(
        "difference",
        "root mean square of the difference from the dense model's numbers, in their unit: 0 is the same",
        perfect=0.0,
        leads=True,
        shown="{:.4g}",
    ),
}


@dataclass(frozen=True)
class Measure:
    """One number about one output, of the repaired model and of the mask alone, both against the dense model.

    Attributes:
        output: as the model calls it (`"logits"`); `"hidden"` for the mean of its last hidden states over each sequence.
        metric: a name in `METRICS`: `"kl"`, `"agreement"`, `"cosine"` or `"difference"`.
        repaired: the finished model's value.
        mask_only: the value of the model with the same units removed, and nothing repaired.
    """

    output: str
    metric: str
    repaired: float
    mask_only: float

    @property
    def is_better(self) -> bool:
        """Whether the repair helps: nearer to the best value, or, of a metric that does not lead, no farther from it."""
        metric = METRICS[self.metric]
        repaired, mask_only = metric.loss(self.repaired), metric.loss(self.mask_only)
        if isnan(mask_only) and not isnan(repaired):
            return True
        return repaired < mask_only or (not metric.leads and repaired == mask_only)

    @property
    def is_unchanged(self) -> bool:
        """Whether neither the mask nor the repair changes anything but the rounding."""
        return all(METRICS[self.metric].loss(value) <= ROUNDING for value in (self.repaired, self.mask_only))

    def __str__(self) -> str:
        metric = METRICS[self.metric]
        repaired, mask_only = (metric.show(value) for value in (self.repaired, self.mask_only))
        return f"{metric.label} of {self.output}: {repaired} (mask alone: {mask_only})"


@dataclass(frozen=True)
class Quality:
    """The output of the finished model beside the dense model's, on a few sequences.

    Attributes:
        measures: what was measured.
        sequences: compared.
        tokens: real tokens in them.
        predictions: rows of the outputs that were compared: sequences, or tokens where each has an output of its own.
        held_out: whether nothing was fitted to these sequences or copies of them.

    Example:
        >>> report = liar.prune(model, calib[1:], keep=0.5, held_out=calib[:1])
        >>> report.quality.held_out, report.quality.sequences, report.quality.measures[0].metric
        (True, 8, 'cosine')
    """

    measures: tuple[Measure, ...]
    sequences: int
    tokens: int
    predictions: int
    held_out: bool

    @property
    def verdict(self) -> OutputVerdict:
        """What this says of the repair; never good news where any of the measures is worse than with the mask alone."""
        if all(measure.is_unchanged for measure in self.measures):
            return OutputVerdict.UNCHANGED
        if not all(measure.is_better or measure.is_unchanged for measure in self.measures):
            return OutputVerdict.NOT_BETTER
        return OutputVerdict.BETTER if self.held_out else OutputVerdict.BETTER_ON_SEEN

    @property
    def where(self) -> str:
        """On what it was measured, as words."""
        text = "held out" if self.held_out else "seen by the fit"
        return f"{self.sequences:,} sequences ({self.tokens:,} tokens), {text}"

    def lines(self) -> list[str]:
        """The measures and the verdict as lines of text."""
        return [
            f"output compared with the dense model's on {self.where}:",
            *(f"  {measure}" for measure in self.measures),
            f"  {self.verdict.value}: {self.verdict.text}",
        ]
