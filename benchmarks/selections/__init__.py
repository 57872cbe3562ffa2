"""The selections, all under one signature: `selection(model, batches, keep, seed)` gives a `liar.Mask`.

    from benchmarks.selections import SELECTIONS
    mask = SELECTIONS["kwon"](model, batches, 0.5, 0)

Every criterion of the library and, one file each, whole published methods. The batches of the grid have no labels, and the
published methods would ignore them. A criterion of the library also takes what `liar.collect` made of the batches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

import liar
from benchmarks.selections import flap, kprune, kwon, llm_pruner, osscar, searched
from benchmarks.selections.criterion import select
from liar.selection import CRITERIA

Select = Callable[[nn.Module, Any, float, int], liar.Mask]

CRITERIA_ONLY: dict[str, Select] = {name: partial(select, criterion=name) for name in CRITERIA}
# In the order of the tables: what looks at data, of the library and of others; then what does not.
SELECTIONS: dict[str, Select] = {
    **{name: selection for name, selection in CRITERIA_ONLY.items() if CRITERIA[name].needs},
    "query_heads": partial(select, criterion="reconstruction", heads="query"),
    "kwon": kwon.select,
    "kprune": kprune.select,
    "flap": flap.select,
    "llm_pruner": llm_pruner.select,
    "osscar": osscar.select,
    "searched": searched.select,
    "searched_from_ours": partial(searched.select, from_ours=True),
    **{name: selection for name, selection in CRITERIA_ONLY.items() if not CRITERIA[name].needs},
}
# Those that sample labels from the model's own predictions where the batches have none.
SAMPLE_LABELS = frozenset({"reconstruction", "fisher", "snip", "taylor", "kwon", "query_heads"})

__all__ = ["SAMPLE_LABELS", "SELECTIONS", "Select"]
