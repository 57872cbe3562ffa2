"""The main functions: `collect`, `select`, `reconstruct`, `prune` and `refine`; docs/theory.md draws what they do."""

from liar.api.collect import collect
from liar.api.prune import prune, prune_with
from liar.api.reconstruct import reconstruct, reconstruct_with
from liar.api.refine import refine, refine_with
from liar.api.select import COSTS, select, select_with

__all__ = [
    "COSTS",
    "collect",
    "prune",
    "prune_with",
    "reconstruct",
    "reconstruct_with",
    "refine",
    "refine_with",
    "select",
    "select_with",
]
