"""Masks made elsewhere: tensors, arrays, lists and dicts of kept units, index lists of removed ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from liar.errors import MaskError
from liar.models import Edge, Layout, Site

FORMATS = (
    'expected {"heads": bool [layers, heads], "neurons": bool [layers, neurons]}, per-layer lists of kept indices, '
    'or a dict by site ("heads.0") or consumer module name'
)


def read_kept(entries: Mapping[str, Any], layout: Layout) -> dict[str, Tensor]:
    """Read entries that say what stays: site name -> bool [units]; sites without an entry stay whole.

    Args:
        entries: see `Mask.of`.
        layout: the model's sites.

    Raises:
        MaskError: see `Mask.of`.
    """
    masks = _everything(layout)
    by_name = {name: site for site in layout.sites for name in (site.name, site.module)}
    first: dict[str, str] = {}
    for name, value in entries.items():
        owned = [site.name for site in layout.of_kind(name)] if name in ("heads", "neurons") else []
        owned = owned or ([by_name[name].name] if name in by_name else [])
        if twice := next((site for site in owned if site in first), None):
            raise MaskError(f"mask[{first[twice]!r}] and mask[{name!r}] both say what {twice} keeps: give one of them")
        first |= dict.fromkeys(owned, name)
        if name in ("heads", "neurons"):
            sized = isinstance(value, Sequence) or getattr(value, "ndim", 0) > 0
            rows = len(value) if sized else type(value).__name__
            if rows != len(layout.blocks):
                raise MaskError(f"mask[{name!r}]: expected one row for each of {len(layout.blocks)} layers, got {rows}")
            for site in layout.of_kind(name):
                masks[site.name] = _row(site, value[site.layer])
        elif name in by_name:
            masks[by_name[name].name] = _row(by_name[name], value)
        else:
            raise MaskError(f"mask[{name!r}]: no such site in this model; {FORMATS}. Sites: {abridged(by_name)}")
    return masks


def read_removed(entries: Mapping[str, Sequence[int]], layout: Layout) -> dict[str, Tensor]:
    """Read index lists that say what goes: site name -> bool [units], True stays; sites without an entry stay whole.

    Args:
        entries: see `Mask.from_removed`.
        layout: the model's sites.

    Raises:
        MaskError: see `Mask.from_removed`.
    """
    if not isinstance(entries, Mapping):
        raise MaskError(f'expected {{"neurons.0": [removed indices], layer name: …}}, got a {type(entries).__name__}')
    masks = _everything(layout)
    edges = {name: (site, edge) for site in layout.sites for name, edge in _names(site).items()}
    first: dict[str, str] = {}
    for name, indices in entries.items():
        if name not in edges:
            raise MaskError(
                f"removed[{name!r}]: expected the name of a site, or the full name of a layer that belongs to one, such as "
                f"{', '.join(_names(layout.sites[0]))}"
            )
        site, edge = edges[name]
        row = _balanced(site, _without(site, edge, indices, f"removed[{name!r}]"), f"removed[{name!r}]")
        _check_not_empty(site, row, f"removed[{name!r}] of {site.name}")
        before = first.setdefault(site.name, name)
        if before != name and not torch.equal(row, masks[site.name]):
            raise MaskError(
                f"removed[{before!r}] and removed[{name!r}] both belong to {site.name} and must remove the same units, got "
                f"units [{_removed(masks[site.name])}] and [{_removed(row)}]"
            )
        masks[site.name] = row
    return masks


def abridged(values: Any, most: int = 8) -> str:
    """The first few of many values, for an error."""
    shown = [str(value) for value in list(values)[:most]]
    return ", ".join(shown) + (", …" if len(values) > most else "")


def _everything(layout: Layout) -> dict[str, Tensor]:
    return {site.name: torch.ones(site.units, dtype=torch.bool) for site in layout.sites}


def _names(site: Site) -> dict[str, Edge | None]:
    """Every name that a list of removed indices of a site may have -> the layer whose channels they are, None for units."""
    return {site.name: None} | {f"{site.block}.{edge.module}": edge for edge in site.edges}


def _removed(unit_mask: Tensor) -> str:
    return abridged((~unit_mask).nonzero().flatten().tolist())


def _without(site: Site, edge: Edge | None, indices: Any, where: str) -> Tensor:
    """The units of a site that stay when these channels of a layer (or units) go: bool [units]."""
    channels = edge.by_unit(site.units) if edge else torch.arange(site.units)[:, None]
    removed = _channels(indices, channels.numel(), where)[channels]
    partial = (removed.any(1) & ~removed.all(1)).nonzero().flatten().tolist()
    if partial:
        unit = partial[0]
        raise MaskError(
            f"{where}: all {channels.shape[1]} channels of a unit go or stay together; unit {unit} of {site.name} is channels "
            f"{_ranges(channels[unit].tolist())} of this layer, got {int(removed[unit].sum())} of them"
            + (f"; units {abridged(partial)} are mixed" if len(partial) > 1 else "")
        )
    return ~removed[:, 0]


def _ranges(channels: list[int]) -> str:
    """Ascending numbers as ranges: "8 to 11, 24 to 27"."""
    starts = [c for c in channels if c - 1 not in channels]
    ends = [c for c in channels if c + 1 not in channels]
    return ", ".join(f"{start} to {end}" for start, end in zip(starts, ends, strict=True))


def _check_not_empty(site: Site, unit_mask: Tensor, where: str) -> None:
    if not unit_mask.any():
        raise MaskError(f"{where}: nothing is kept; keep at least one of {site.units} units")


def _channels(indices: Any, total: int, where: str) -> Tensor:
    """An index list as bool [total]."""
    if not isinstance(indices, Sequence) or isinstance(indices, str):
        raise MaskError(f"{where}: expected a list of removed indices, got a {type(indices).__name__}; arrays have .tolist()")
    if not all(isinstance(v, (int, np.integer)) and not isinstance(v, bool) for v in indices):
        raise MaskError(f"{where}: a list must hold removed indices (integers), got {abridged(indices)}")
    wrong = [v for v, times in Counter(indices).items() if times > 1 or not 0 <= v < total]
    if wrong:
        raise MaskError(f"{where}: expected removed indices, each once and from 0 to {total - 1}, got {abridged(wrong)}")
    return _marked(indices, total)


def _row(site: Site, value: Any) -> Tensor:
    """The kept units of one site from a bool or 0/1 tensor or array, a list of bools, or a list of kept indices."""
    where = f"mask of {site.name} ({site.module})"
    if isinstance(value, Sequence) and not (value and all(isinstance(v, (bool, np.bool_)) for v in value)):
        unit_mask = _balanced(site, _from_indices(site, value, where), where)
    else:
        try:
            row = torch.as_tensor(value).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise MaskError(f"{where}: expected a bool tensor or a list of kept indices, got {type(value).__name__}") from error
        unit_mask = _ungrouped(site, _as_bool(row, where), where)
    _check_not_empty(site, unit_mask, where)
    return unit_mask


def _from_indices(site: Site, value: Sequence[Any], where: str) -> Tensor:
    if not all(isinstance(v, (int, np.integer)) for v in value):
        raise MaskError(f"{where}: a list must hold kept indices (integers) or bools, got {abridged(value)}")
    if len(set(value)) != len(value) or any(not 0 <= v < site.units for v in value):
        raise MaskError(
            f"{where}: a list of integers is read as kept indices, each once and from 0 to {site.units - 1}, "
            f"got {abridged(value)}; for a 0/1 mask pass a tensor or an array"
        )
    return _marked(value, site.units)


def _marked(indices: Sequence[int], total: int) -> Tensor:
    """Bool [total]: True at the indices."""
    row = torch.zeros(total, dtype=torch.bool)
    row[torch.tensor(list(indices), dtype=torch.int64)] = True
    return row


def _as_bool(row: Tensor, where: str) -> Tensor:
    if row.dtype != torch.bool and not bool(((row == 0) | (row == 1)).all()):
        raise MaskError(
            f"{where}: expected bool, or numbers that are exactly 0 or 1, got {row.dtype} with values "
            f"{abridged(row.flatten().tolist())}; threshold your scores first"
        )
    return row.bool()


def _ungrouped(site: Site, row: Tensor, where: str) -> Tensor:
    if row.ndim == 1 and len(row) == site.units:
        return _balanced(site, row, where)
    if row.ndim != 1 or len(row) != site.units * site.query_heads:
        more = f" (or {site.units * site.query_heads} query heads)" if site.query_heads > 1 else ""
        raise MaskError(f"{where}: expected shape [{site.units}]{more}, got {list(row.shape)}")
    groups = row.view(site.units, site.query_heads)
    if bool((groups == groups[:, :1]).all()):
        return groups[:, 0]
    if site.by_query is None:
        raise MaskError(
            f"{where}: the {site.query_heads} query heads of a group share one key and value head and are kept or removed "
            f"together; groups {(groups != groups[:, :1]).any(1).nonzero().flatten().tolist()} are mixed"
        )
    return _balanced(site.by_query, row, where)


def _balanced(site: Site, row: Tensor, where: str) -> Tensor:
    """The row, after making sure that all groups of its units keep equally many."""
    if not site.groups:
        return row
    kept = row.view(site.groups, -1).sum(1)
    if not bool((kept == kept[0]).all()):
        raise MaskError(
            f"{where}: the query heads of a group share one key and value head; expected whole groups to go, or equally many "
            f"heads to stay in all {site.groups} groups, got {abridged(kept.tolist())}"
        )
    return row
