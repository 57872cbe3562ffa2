"""The library's own selection, by any of its criteria."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

import liar
from liar.criteria import CRITERIA


def select(
    model: nn.Module,
    batches: Sequence[Any] | liar.Statistics,
    keep: float,
    seed: int,
    *,
    criterion: str,
    drop: bool = False,
) -> liar.Mask:
    """One budget for all sites where their scores are in one unit; elsewhere every layer keeps the same share."""
    scope = "global" if CRITERIA[criterion].comparable else "layer"
    return liar.select(model, batches, keep=keep, criterion=criterion, scope=scope, drop=drop, seed=seed, progress=False)
