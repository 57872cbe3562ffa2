"""What a report holds, without the forms it is shown in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from liar.report.quality import Quality
from liar.verdicts import Verdict


@dataclass(frozen=True)
class SiteReport:
    """One site.

    Attributes:
        site: name, such as `"neurons.3"`.
        module: full name of the consumer.
        kept: units left.
        total: units before.
        before: residual energy over the target's, on held-out tokens, with the kept weights as they were (NaN if nothing
            could be held out).
        after: the same after reconstruction (fitted without those tokens).
        verdict: how the solve ended.
        ridge: relative ridge; infinite where the kept weights stayed.
        condition: of the system solved.
        seconds: of the solve for the weights of the consumer, without passes and without the refit of the producers.
        bias_created: whether the layer got a bias it did not have.

    Example:
        >>> report = liar.reconstruct(model, {"neurons.1": range(32)}, calib, progress=False)
        >>> site = report.sites[-1]
        >>> site.site, site.module, site.kept, site.after < site.before
        ('neurons.1', 'encoder.layer.1.output.dense', 32, True)
    """

    site: str
    module: str
    kept: int
    total: int
    before: float
    after: float
    verdict: Verdict
    ridge: float
    condition: float
    seconds: float
    bias_created: bool = False


@dataclass(frozen=True)
class CostChange:
    """What the model costs by the budget that was selected by.

    Attributes:
        name: what is counted, as `Costs.name`: `"FLOPs"`, `"seconds"`.
        before: of the dense model.
        after: with the kept units. Of time, the sum of what was measured for every layer, and not a measurement of the result.
    """

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class ReportContent:
    """The fields of a `Report`, which explains them: what tables, figures and pages are made from."""

    sites: tuple[SiteReport, ...]
    requested: float | None
    achieved: float
    parameters: tuple[int, int]
    tokens: int
    sequences: int
    options: Mapping[str, Any]
    dtype: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    quality: Quality | None = None
    distinct_tokens: int | None = None
    lengths: tuple[int, int, int] | None = None
    cost: CostChange | None = None


def kind_of(site: str) -> str:
    """`"heads"` of `"heads.3"`."""
    return site.rpartition(".")[0]


def layer_of(site: str) -> int:
    """3 of `"heads.3"`."""
    return int(site.rpartition(".")[2])
