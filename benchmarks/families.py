"""What can be cut in every known family of models, found on a tiny random model of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.summary import lined
from liar import Family, discover, families
from liar.models import Layout
from liar.surgery import stock_counts
from liar.testing import tiny_model

HEADINGS = ("family", "a unit of attention", "feed-forward part", "fewer in every layer load in the stock class", "not cut")


def table() -> str:
    """A Markdown table with a line for every family."""
    return lined(HEADINGS, [line(family) for family in sorted(families(), key=lambda each: each.model_type)])


def line(family: Family) -> list[str]:
    """Of one family."""
    model = tiny_model(family.model_type)
    layout, counts = discover(model), stock_counts(model)
    heads, neurons = (layout.of_kind(kind)[:1] for kind in ("heads", "neurons"))
    units = [("query heads with their key and value head" if site.query_heads > 1 else "head") for site in heads]
    return [
        f"`{family.model_type}`",
        units[0] if units else "—",
        "neurons" if neurons else "—",
        _loadable(layout, counts),
        "" if heads and neurons and not layout.uncovered else family.note,
    ]


def _loadable(layout: Layout, counts: Mapping[str, Sequence[int]]) -> str:
    """The kinds of units of which the stock class can build fewer."""
    fewer = [kind for kind, legal in counts.items() if any(count < layout.of_kind(kind)[0].units for count in legal)]
    return " and ".join(fewer) or "—"
