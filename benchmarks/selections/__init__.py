"""The selections, all under one signature: `selection(model, batches, keep, seed)` gives a `liar.Mask`.

    from selections import SELECTIONS
    mask = SELECTIONS["kwon"](model, batches, 0.5, 0)

Every criterion of the library (`dropping` is the default one with `drop=True`) and, one file each, whole procedures of others.
The ladder's batches have no labels, and the procedures of others would not look at them. A criterion of the library also takes
what `liar.collect` made of the batches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

import liar
from liar.criteria import CRITERIA
from selections import kprune, kwon
from selections.criterion import select

Select = Callable[[nn.Module, Any, float, int], liar.Mask]

CRITERIA_ONLY: dict[str, Select] = {name: partial(select, criterion=name) for name in CRITERIA}
# In the order of the tables: what looks at data, of the library and of others; then what does not.
SELECTIONS: dict[str, Select] = {
    **{name: made for name, made in CRITERIA_ONLY.items() if CRITERIA[name].needs},
    "kwon": kwon.select,
    "kprune": kprune.select,
    **{name: made for name, made in CRITERIA_ONLY.items() if not CRITERIA[name].needs},
    "dropping": partial(select, criterion="reconstruction", drop=True),
}

__all__ = ["SELECTIONS", "Select"]
