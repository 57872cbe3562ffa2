"""Which units stay: a frozen `Mask`, made from whatever a user has, checked against the sites of a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from liar.errors import MaskError
from liar.sites import Layout, Site

FORMS = (
    'expected {"heads": bool [layers, heads], "neurons": bool [layers, neurons]}, per-layer lists of kept indices, '
    'or a dict by site ("heads.0") or consumer module name'
)


@dataclass(frozen=True, eq=False)
class Mask:
    """The kept units of every site: site name -> bool [units], True stays.

    Attributes:
        keep: by site name.
        asked: the share of parameters that was asked for, where a budget made the mask; not part of equality.

    Make one with `liar.select`, or with `Mask.of` from tensors, arrays, lists or dicts made elsewhere.

    Example:
        >>> mask = Mask({"heads.0": torch.tensor([True, False])})
        >>> mask.kept("heads.0"), Mask.from_json(mask.to_json()) == mask
        (1, True)
    """

    keep: Mapping[str, Tensor]
    asked: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", {name: keep.detach().cpu().clone() for name, keep in self.keep.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self.keep[name]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Mask)
            and self.keep.keys() == other.keep.keys()
            and all(torch.equal(keep, other[name]) for name, keep in self.keep.items())
        )

    __hash__ = None  # type: ignore[assignment]

    def kept(self, name: str) -> int:
        """How many units of a site stay."""
        return int(self.keep[name].sum())

    def whole(self, name: str) -> bool:
        """Whether nothing of a site is removed."""
        return bool(self.keep[name].all())

    def parameters(self, layout: Layout) -> int:
        """Parameters left in the model's blocks."""
        return layout.kept_parameters({name: self.kept(name) for name in self.keep})

    def to_json(self) -> str:
        """JSON with the kept indices and the number of units per site."""
        sites = {name: {"units": len(keep), "kept": keep.nonzero().flatten().tolist()} for name, keep in self.keep.items()}
        return json.dumps({"mask": sites, "asked": self.asked})

    @classmethod
    def from_json(cls, text: str) -> Mask:
        """The inverse of `to_json`.

        Raises:
            MaskError: the text is not such a JSON.
        """
        try:
            content = json.loads(text)
            sites = content["mask"]
            keep = {name: torch.zeros(site["units"], dtype=torch.bool) for name, site in sites.items()}
            for name, site in sites.items():
                keep[name][torch.tensor(site["kept"], dtype=torch.int64)] = True
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise MaskError(f'expected a JSON with {{"mask": {{site: {{"units", "kept"}}}}}}: {error!r}') from error
        return cls(keep, content.get("asked"))

    def save(self, path: str | Path) -> None:
        """Write `to_json` to a file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Mask:
        """Read a file that `save` wrote."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))

    @classmethod
    def of(cls, mask: Mask | Mapping[str, Any], layout: Layout) -> Mask:
        """Check a mask of any accepted form against the sites of a model; sites it does not name stay whole.

        For attention with shared key and value heads `heads` may have one column per key/value head, or one per query
        head if all query heads of a group agree.

        Raises:
            MaskError: wrong shape, name or dtype, or a site that keeps nothing; names the site and what was expected.
        """
        entries, asked = (mask.keep, mask.asked) if isinstance(mask, Mask) else (mask, None)
        if not isinstance(entries, Mapping):
            raise MaskError(f"{FORMS}; got a {type(mask).__name__}")
        keep = {site.name: torch.ones(site.units, dtype=torch.bool) for site in layout.sites}
        by_name = {name: site for site in layout.sites for name in (site.name, site.module)}
        for name, value in entries.items():
            if name in ("heads", "neurons"):
                sites = layout.of_kind(name)
                sized = isinstance(value, Sequence) or getattr(value, "ndim", 0) > 0
                rows = len(value) if sized else type(value).__name__
                if rows != len(sites):
                    raise MaskError(f"mask[{name!r}]: expected one row for each of {len(sites)} layers, got {rows}")
                for site, row in zip(sites, value, strict=True):
                    keep[site.name] = _row(site, row)
            elif name in by_name:
                keep[by_name[name].name] = _row(by_name[name], value)
            else:
                raise MaskError(f"mask[{name!r}]: no such site in this model; {FORMS}. Sites: {_abridged(by_name)}")
        return cls(keep, asked)


def _row(site: Site, value: Any) -> Tensor:
    """The kept units of one site from a bool or 0/1 tensor or array, a list of bools, or a list of kept indices."""
    where = f"mask of {site.name} ({site.module})"
    if isinstance(value, Sequence) and not (value and all(isinstance(v, (bool, np.bool_)) for v in value)):
        keep = _from_indices(site, value, where)
    else:
        try:
            row = torch.as_tensor(value).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise MaskError(f"{where}: expected a bool tensor or a list of kept indices, got {type(value).__name__}") from error
        keep = _ungrouped(site, _as_bool(row, where), where)
    if not keep.any():
        raise MaskError(f"{where}: nothing is kept; keep at least one of {site.units} units")
    return keep


def _from_indices(site: Site, value: Sequence[Any], where: str) -> Tensor:
    if not all(isinstance(v, (int, np.integer)) for v in value):
        raise MaskError(f"{where}: a list must hold kept indices (integers) or bools, got {_abridged(value)}")
    if len(set(value)) != len(value) or any(not 0 <= v < site.units for v in value):
        raise MaskError(
            f"{where}: a list of integers is read as kept indices, each once and from 0 to {site.units - 1}, "
            f"got {_abridged(value)}; for a 0/1 mask pass a tensor or an array"
        )
    keep = torch.zeros(site.units, dtype=torch.bool)
    keep[torch.tensor(list(value), dtype=torch.int64)] = True
    return keep


def _as_bool(row: Tensor, where: str) -> Tensor:
    if row.dtype != torch.bool and not bool(((row == 0) | (row == 1)).all()):
        raise MaskError(
            f"{where}: expected bool, or numbers that are exactly 0 or 1, got {row.dtype} with values "
            f"{_abridged(row.flatten().tolist())}; threshold your scores first"
        )
    return row.bool()


def _ungrouped(site: Site, row: Tensor, where: str) -> Tensor:
    if row.ndim == 1 and len(row) == site.units:
        return row
    if row.ndim != 1 or len(row) != site.units * site.query_heads:
        more = f" (or {site.units * site.query_heads} query heads)" if site.query_heads > 1 else ""
        raise MaskError(f"{where}: expected shape [{site.units}]{more}, got {list(row.shape)}")
    groups = row.view(site.units, site.query_heads)
    if not bool((groups == groups[:, :1]).all()):
        raise MaskError(
            f"{where}: the {site.query_heads} query heads of a group share one key and value head and are kept or removed "
            f"together; groups {(groups != groups[:, :1]).any(1).nonzero().flatten().tolist()} are mixed"
        )
    return groups[:, 0]


def _abridged(values: Any, most: int = 8) -> str:
    shown = [str(value) for value in list(values)[:most]]
    return ", ".join(shown) + (", …" if len(values) > most else "")
