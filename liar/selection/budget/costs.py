"""What a model costs by how many units each site keeps: parameters, FLOPs, or measured seconds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from liar.errors import BudgetError, wrap_parse_errors
from liar.files import user_path, write_text
from liar.models import Layout, Site, layer_of, layout_of
from liar.options import LENGTH, check_count

WRITTEN = "costs as Costs.save or `liar latency` writes them"


@dataclass(frozen=True)
class Costs:
    """A cost that is a sum over sites.

    Attributes:
        name: what is counted, as messages say it.
        fixed: cost of what no mask changes.
        sites: site name -> number of kept units -> cost. A site may keep just the numbers that are listed.
        about: how it was found, such as device, batch size and length.

    Example:
        >>> costs = liar.flops(model, length=64)
        >>> costs.of({site: max(levels) for site, levels in costs.sites.items()}) == costs.dense
        True
    """

    name: str
    fixed: float
    sites: Mapping[str, Mapping[int, float]]
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise a `BudgetError` unless there is a name, and a finite cost by site and number of units."""
        if not isinstance(self.name, str) or not self.name:
            raise BudgetError(f"name: expected a text that says what is counted, got {self.name!r}")
        if not isinstance(self.sites, Mapping) or not all(isinstance(levels, Mapping) for levels in self.sites.values()):
            raise BudgetError(f"expected {{site: {{number of units: cost}}}}, got {self.sites!r}")
        for where, cost in (("fixed", self.fixed), *((n, c) for n, levels in self.sites.items() for c in levels.values())):
            if not isinstance(cost, (int, float, np.integer, np.floating)) or isinstance(cost, bool) or not -inf < cost < inf:
                raise BudgetError(f"{where}: expected finite costs, got {cost!r}")
        if self.fixed < 0:
            raise BudgetError(f"fixed: expected a cost of at least 0, got {self.fixed!r}")
        for name, levels in self.sites.items():
            if not isinstance(name, str) or not all(isinstance(n, (int, np.integer)) and n >= 0 for n in levels):
                raise BudgetError(f"{name!r}: expected costs by whole numbers of units, got {list(levels)!r}")
        plain = {name: {int(n): _plain(cost) for n, cost in levels.items()} for name, levels in self.sites.items()}
        object.__setattr__(self, "sites", plain)
        object.__setattr__(self, "fixed", _plain(self.fixed))

    @cached_property
    def dense(self) -> float:
        """Of the model as it is."""
        return self.of({name: max(levels) for name, levels in self.sites.items()})

    def of(self, kept: Mapping[str, int]) -> float:
        """With so many units left per site name."""
        return self.fixed + sum(self.sites[name][number] for name, number in kept.items())

    @cached_property
    def unit_costs(self) -> Mapping[str, float] | None:
        """Cost of one unit by site; None where units of a site do not all cost the same."""
        by_site = {}
        for name, levels in self.sites.items():
            cost = levels.get(1, 0.0)
            if any(levels.get(number) != number * cost for number in range(1, max(levels) + 1)):
                return None
            by_site[name] = cost
        return by_site

    def check(self, layout: Layout) -> None:
        """Whether these are the costs of a model with such sites.

        Raises:
            BudgetError: they are not.
        """
        expected = {site.name: site.units for site in layout.sites}
        actual = {name: max(levels, default=0) for name, levels in self.sites.items()}
        if expected != actual:
            wrong = sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name))
            raise BudgetError(
                f"the costs ({self.name}) are those of another model: {wrong[0]} has {expected.get(wrong[0], 0)} units in this "
                f"one and {actual.get(wrong[0], 0)} there; make them from this model"
            )
        if not self.dense > 0:
            raise BudgetError(f"the costs ({self.name}) of the whole model are 0: there is nothing to keep a share of")

    def to_json(self) -> str:
        """JSON."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Costs:
        """The inverse of `to_json`.

        Raises:
            BudgetError: the text is not such a JSON.
        """
        with wrap_parse_errors(BudgetError, WRITTEN):
            content = json.loads(text)
            sites = {
                name: {int(number): float(cost) for number, cost in levels.items()} for name, levels in content["sites"].items()
            }
            return cls(str(content["name"]), float(content["fixed"]), sites, dict(content["about"]))

    def save(self, path: str | Path) -> None:
        """Write `to_json` to a file, whole or not at all."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Costs:
        """Read a file that `save` wrote.

        Raises:
            BudgetError: it is not one.
        """
        with wrap_parse_errors(BudgetError, WRITTEN, path):
            return cls.from_json(user_path(path).read_text(encoding="utf-8"))


def _plain(number: Any) -> float:
    """A number of Python's own, which JSON has."""
    own: float = number.item() if isinstance(number, np.generic) else number
    return own


def params(model: nn.Module) -> Costs:
    """Parameters in the blocks of a model."""
    return params_of(layout_of(model))


def params_of(layout: Layout) -> Costs:
    """Parameters in the blocks of a model with some layout."""
    fixed = layout.kept_parameters({site.name: 0 for site in layout.sites})
    return _same_for_every_unit("parameters", fixed, layout, lambda site: site.parameters)


def flops(model: nn.Module, *, length: int = LENGTH) -> Costs:
    """Floating-point operations of all matrix products in the blocks, for one sequence, as a budget for `select`.

    A product of [n, k] and [k, m] counts 2 n k m. A head adds two products of `length` by `length` per channel: queries with
    keys, and attention weights with values.

    Args:
        model: a Hugging Face model of a known family.
        length: tokens in the sequence.

    Raises:
        OptionError: a length that is no whole number of at least 1.

    Example:
        >>> liar.flops(model, length=256).dense > 2 * liar.flops(model, length=128).dense
        True
    """
    check_count("length", length)
    return flops_of(model, layout_of(model), length=int(length))


def flops_of(model: nn.Module, layout: Layout, *, length: int = LENGTH) -> Costs:
    """`flops` of a model with some layout."""

    def of_unit(site: Site) -> int:
        block = model.get_submodule(site.block)
        producers = sum(edge.width * layer_of(block, edge).size("in") for edge in site.producers)
        layers = producers + site.consumer.width * site.out
        return 2 * length * (layers + (2 * length * site.consumer.width if site.kind == "heads" else 0))

    cut = {f"{site.block}.{edge.module}" for site in layout.sites for edge in site.edges}
    whole = {f"{site.block}.{name}" for site in layout.sites for name in site.inputs} - cut
    others = sum(model.get_parameter(f"{name}.weight").numel() for name in (*layout.uncovered, *sorted(whole)))
    return _same_for_every_unit("FLOPs", 2 * length * others, layout, of_unit)


def _same_for_every_unit(name: str, fixed: int, layout: Layout, unit_cost: Callable[[Site], int]) -> Costs:
    """Every unit of a site costs the same, and any number may stay."""
    costs = {site.name: unit_cost(site) for site in layout.sites}
    return Costs(name, fixed, {s.name: {n: n * costs[s.name] for n in range(1, s.units + 1)} for s in layout.sites})
