"""The library's own selection, by any of its criteria."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

import liar
from liar.selection import CRITERIA


def select(
    model: nn.Module,
    batches: Sequence[Any] | liar.CriterionStatistics,
    keep: float,
    seed: int,
    *,
    criterion: str,
    heads: str = "group",
) -> liar.Mask:
    """One budget for all sites where their scores are in one unit; elsewhere every layer keeps the same share."""
    widths = "free" if CRITERIA[criterion].comparable else "balanced"
    return liar.select(model, batches, keep=keep, criterion=criterion, widths=widths, seed=seed, heads=heads, progress=False)
