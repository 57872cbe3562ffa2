"""Masks that follow from others: the one that keeps everything, and two cuts one after the other as one."""

from __future__ import annotations

import torch
from torch import Tensor

from liar.mask.mask import Mask
from liar.models import Layout


def keep_all(layout: Layout) -> Mask:
    """The mask that cuts nothing."""
    return Mask({site.name: torch.ones(site.units, dtype=torch.bool) for site in layout.sites})


def compose(first: Mask, second: Mask) -> Mask:
    """What two cuts leave of the model as it was before both: `second` counts the units that `first` left.

    One of them may count groups of query heads where the other counts the heads.

    Example:
        >>> first, second = (Mask({"heads.0": torch.tensor(row)}) for row in ([True, False, True], [False, True]))
        >>> compose(first, second)["heads.0"]
        tensor([False, False,  True])
    """
    return Mask({name: _composed(mask, second[name]) for name, mask in first.masks.items()}, second.requested)


def _composed(first: Tensor, second: Tensor) -> Tensor:
    kept = int(first.sum())
    if len(second) > kept:
        first = first.repeat_interleave(len(second) // kept)
    elif len(second) < kept:
        second = second.repeat_interleave(kept // len(second))
    result = first.clone()
    result[first.clone()] = second
    return result
