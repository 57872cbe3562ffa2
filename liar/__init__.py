"""liar: makes a pruned transformer work again without training.

The three verbs are `select`, `reconstruct` and `prune`; `calibration` makes batches from texts, `save` and `load` keep pruned
models, `collect` reuses statistics for many budgets, `discover` shows where a model can be cut, `remove` cuts without repair,
`refine` goes on with gradients, `moments` and `interpolation` let you look inside, `self_generate` lets a model write its
calibration texts, `plan` says what a run will need.

What a name stands for is imported when it is first used: torch and transformers take seconds, and `liar --help` needs neither.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from liar.analysis import Interpolation, interpolation, moments
    from liar.api import collect, prune, reconstruct, refine, select
    from liar.data import Calibration, calibration
    from liar.errors import LiarError
    from liar.generation import SelfGenerated, self_generate
    from liar.io import load, make_standalone, save
    from liar.mask import Mask
    from liar.models import Family, FusedProducer, HeadArgument, SitePattern, Stack, families, register
    from liar.planning import Plan, plan
    from liar.progress import ProgressUpdate
    from liar.report import Report, plot
    from liar.selection import Costs, CriterionStatistics, flops, latency
    from liar.surgery import remove
    from liar.tracing import discover, propose_family
    from liar.verdicts import Verdict

_MODULES = {
    "analysis": ("Interpolation", "interpolation", "moments"),
    "api": ("collect", "prune", "reconstruct", "refine", "select"),
    "data": ("Calibration", "calibration"),
    "errors": ("LiarError",),
    "generation": ("SelfGenerated", "self_generate"),
    "io": ("load", "make_standalone", "save"),
    "mask": ("Mask",),
    "models": ("Family", "FusedProducer", "HeadArgument", "SitePattern", "Stack", "families", "register"),
    "planning": ("Plan", "plan"),
    "progress": ("ProgressUpdate",),
    "report": ("Report", "plot"),
    "selection": ("Costs", "CriterionStatistics", "flops", "latency"),
    "surgery": ("remove",),
    "tracing": ("discover", "propose_family"),
    "verdicts": ("Verdict",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Calibration",
    "Costs",
    "CriterionStatistics",
    "Family",
    "FusedProducer",
    "HeadArgument",
    "Interpolation",
    "LiarError",
    "Mask",
    "Plan",
    "ProgressUpdate",
    "Report",
    "SelfGenerated",
    "SitePattern",
    "Stack",
    "Verdict",
    "calibration",
    "collect",
    "discover",
    "families",
    "flops",
    "interpolation",
    "latency",
    "load",
    "make_standalone",
    "moments",
    "plan",
    "plot",
    "propose_family",
    "prune",
    "reconstruct",
    "refine",
    "register",
    "remove",
    "save",
    "select",
    "self_generate",
]


def __getattr__(name: str) -> Any:
    """A public name, or a package of the library, imported now (PEP 562)."""
    if name in _HOME:
        value = getattr(import_module(f"liar.{_HOME[name]}"), name)
    elif name in {*_MODULES, "options", "repair", "runtime", "solve", "statistics", "files", "unstructured"}:
        value = import_module(f"liar.{name}")
    else:
        raise AttributeError(f"module 'liar' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
