"""The published repair rules, all under one signature: `rule(model, mask, calib)` makes the model smaller in place.

    from benchmarks.baselines import RULES
    RULES["kprune"](model, mask, calib)

One file per rule; `site_data.py` says what a closed-form rule may look at, `closed_form.py` is the repair step that applies it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

import liar
from benchmarks.baselines import bias, grail, kprune, liar_rule, mask_only, mask_tuning, osscar, rcpu
from benchmarks.baselines.closed_form import repair
from benchmarks.baselines.fine_tuning import fine_tune
from benchmarks.baselines.site_data import Rule, SiteData

Apply = Callable[..., None]


def ours(model: nn.Module, mask: liar.Mask, calib: Sequence[Any], **options: Any) -> None:
    """This library as it ships, or with options; the benchmarks compare the output themselves."""
    liar.reconstruct(model, mask, calib, quality=0, progress=False, **options)


SOLVERS: dict[str, Rule] = {
    "mask_only": mask_only.RULE,
    "bias": bias.RULE,
    "mask_tuning": mask_tuning.RULE,
    "mask_tuning_dense": mask_tuning.DENSE_TEACHER,
    "liar": liar_rule.RULE,
    "grail": grail.RULE,
    "rcpu": rcpu.RULE,
    "kprune": kprune.RULE,
    "kprune_ridge": kprune.RIDGED,
    "osscar": osscar.RULE,
    "osscar_fullseq": osscar.FULL,
}
OURS: dict[str, Apply] = {
    "ours_no_refit": partial(ours, target="residual_stream", refit=False),
    "ours_residual_stream": partial(ours, target="residual_stream"),
    "ours": ours,
}
RULES: dict[str, Apply] = {
    **{name: partial(repair, rule=rule) for name, rule in SOLVERS.items()},
    **OURS,
    "ours_created_bias": partial(ours, bias="create"),
    "fine_tuning": fine_tune,
}
# What is measured in every cell, in the order of the tables.
CLOSED_FORM = (*SOLVERS, *OURS)

__all__ = ["CLOSED_FORM", "RULES", "SOLVERS", "Apply", "Rule", "SiteData"]
