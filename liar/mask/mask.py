"""Which units stay: a frozen `Mask`, made from whatever a user has, checked against the sites of a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liar.errors import MaskError, wrap_parse_errors
from liar.files import user_path, write_text
from liar.mask.formats import FORMATS, abridged, read_kept, read_removed
from liar.models import Layout
from liar.options import check_share
from liar.templates import render

WRITTEN = 'a JSON with {"mask": {site: {"units", "kept"}}}, as Mask.save writes it'
# Units of a site; a damaged file should not ask for all memory there is.
MOST = 2**24


@dataclass(frozen=True, eq=False)
class Mask:
    """The kept units of every site: site name -> bool [units], True stays.

    Attributes:
        masks: by site name.
        requested: the share of parameters that was requested, where a budget made the mask; not part of equality.

    Make one with `liar.select`, or with `Mask.of` from tensors, arrays, lists or dicts made elsewhere.

    Example:
        >>> mask = Mask({"heads.0": torch.tensor([True, False])})
        >>> mask.kept("heads.0"), Mask.from_json(mask.to_json()) == mask
        (1, True)
    """

    masks: Mapping[str, Tensor]
    requested: float | None = None

    def __post_init__(self) -> None:
        """Own the tensors.

        Raises:
            MaskError: something else than a bool tensor of one dimension by site name, or a share that is none.
        """
        rows = self.masks.items() if isinstance(self.masks, Mapping) else [("masks", self.masks)]
        for name, row in rows:
            is_row = isinstance(row, Tensor) and row.dtype == torch.bool and row.ndim == 1 and not row.is_meta
            if not isinstance(name, str) or not is_row:
                actual = f"{row.dtype} {list(row.shape)}" if isinstance(row, Tensor) else type(row).__name__
                raise MaskError(
                    f"Mask: expected bool tensors [units] by the name of their site, got {name!r}: {actual}; "
                    "see Mask.of(mask, layout)"
                )
        if self.requested is not None:
            check_share("requested", self.requested)
            object.__setattr__(self, "requested", float(self.requested))
        object.__setattr__(self, "masks", {name: mask.detach().cpu().clone() for name, mask in self.masks.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self.masks[name]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Mask)
            and self.masks.keys() == other.masks.keys()
            and all(torch.equal(mask, other[name]) for name, mask in self.masks.items())
        )

    __hash__ = None  # type: ignore[assignment]

    def _repr_html_(self) -> str:
        """What notebooks show."""
        kept, total = (sum(map(size, self.masks.values())) for size in (lambda row: int(row.sum()), len))
        rows = [
            {"site": name, "kept": self.kept(name), "total": len(row), "share": self.kept(name) / max(len(row), 1)}
            for name, row in self.masks.items()
        ]
        return render("mask_cell.html.j2", title=f"{kept:,} of {total:,} units kept", rows=rows)

    def __and__(self, other: Mask) -> Mask:
        """The units that both masks keep; `requested` is None.

        Raises:
            MaskError: the masks are not of the same sites and units, or both keep something at a site but nothing together.

        Example:
            >>> some, more = Mask({"heads.0": torch.tensor([True, False])}), Mask({"heads.0": torch.tensor([True, True])})
            >>> some & more == some, some | more == more
            (True, True)
        """
        pairs = self._beside(other)
        both = {name: a & b for name, (a, b) in pairs.items()}
        empty = [name for name, (a, b) in pairs.items() if a.any() and b.any() and not both[name].any()]
        if empty:
            raise MaskError(f"mask & mask keeps nothing at {abridged(empty)}; keep at least one unit of every site in both")
        return Mask(both)

    def __or__(self, other: Mask) -> Mask:
        """The units that at least one of the masks keeps; `requested` is None.

        Raises:
            MaskError: the masks are not of the same sites and units.
        """
        return Mask({name: a | b for name, (a, b) in self._beside(other).items()})

    def overlap(self, other: Mask) -> dict[str, float]:
        """How alike two masks are: by site, units that both keep over units that at least one keeps (Jaccard index).

        1.0 is the same choice, 0.0 nothing in common. Two random choices of half the units come to about 1/3.

        Raises:
            MaskError: the masks are not of the same sites and units.

        Example:
            >>> by_size = liar.select(model, keep=0.5, criterion="magnitude")
            >>> at_random = liar.select(model, keep=0.5, criterion="random")
            >>> list(by_size.overlap(at_random)), by_size.overlap(by_size)["heads.0"]
            (['heads.0', 'neurons.0', 'heads.1', 'neurons.1'], 1.0)
        """
        pairs = self._beside(other)
        # Where neither keeps anything, the choices are the same.
        return {name: int((a & b).sum()) / int((a | b).sum()) if (a | b).any() else 1.0 for name, (a, b) in pairs.items()}

    def _beside(self, other: object) -> dict[str, tuple[Tensor, Tensor]]:
        """Site name -> the rows of both masks, after making sure that they can be compared unit by unit."""
        if not isinstance(other, Mask):
            raise MaskError(f"expected two masks, got a Mask and a {type(other).__name__}; see Mask.of(mask, layout)")
        for name in {**self.masks, **other.masks}:
            rows = [mask.masks.get(name) for mask in (self, other)]
            if any(row is None or row.dtype != torch.bool or row.shape != self[name].shape for row in rows):
                shown = " and ".join("no such site" if row is None else f"{row.dtype} {list(row.shape)}" for row in rows)
                raise MaskError(f"{name}: expected bool of one size in both masks, got {shown}; see Mask.of(mask, layout)")
        return {name: (mine, other[name]) for name, mine in self.masks.items()}

    def kept(self, name: str) -> int:
        """How many units of a site stay."""
        return int(self.masks[name].sum())

    def keeps_all(self, name: str) -> bool:
        """Whether nothing of a site is removed."""
        return bool(self.masks[name].all())

    def parameters(self, layout: Layout) -> int:
        """Parameters left in the model's blocks."""
        return layout.matching(self.masks).kept_parameters({name: self.kept(name) for name in self.masks})

    def to_json(self) -> str:
        """JSON with the kept indices and the number of units per site."""
        sites = {name: {"units": len(mask), "kept": mask.nonzero().flatten().tolist()} for name, mask in self.masks.items()}
        return json.dumps({"mask": sites, "requested": self.requested})

    @classmethod
    def from_json(cls, text: str) -> Mask:
        """The inverse of `to_json`.

        Raises:
            MaskError: the text is not such a JSON.
        """
        with wrap_parse_errors(MaskError, WRITTEN):
            content = json.loads(text)
            sites = content["mask"]
            masks = {name: _mask_of(site["units"], site["kept"]) for name, site in sites.items()}
            return cls(masks, content.get("requested"))

    def save(self, path: str | Path) -> None:
        """Write `to_json` to a file, whole or not at all."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Mask:
        """Read a file that `save` wrote.

        Raises:
            MaskError: it is not one.
        """
        with wrap_parse_errors(MaskError, WRITTEN, path):
            return cls.from_json(user_path(path).read_text(encoding="utf-8"))

    @classmethod
    def of(cls, mask: Mask | Mapping[str, Any], layout: Layout) -> Mask:
        """Check a mask of any accepted form against the sites of a model; sites it does not name stay whole.

        `heads` and `neurons` have a row for every layer. For attention with shared key and value heads `heads` may have one
        column per key/value head, or one per query head: whole groups of them go with their key and value head, or equally
        many stay in every group, and all keys and values.

        The `head_mask` [layers, heads] and `neuron_mask` [layers, neurons] of Kwon et al., floats that are 0 or 1, are the
        entries `heads` and `neurons`. Tuned masks hold scales; give `head_mask != 0`.

        Args:
            mask: a `Mask`, or entries by kind, site or module.
            layout: the sites of the model, see `liar.discover`.

        Raises:
            MaskError: wrong shape, name or dtype, or a site that keeps nothing; names the site and what was expected.

        Example:
            >>> layout = liar.discover(model)
            >>> head_mask, neuron_mask = torch.ones(2, 4), torch.ones(2, 64)
            >>> head_mask[0, 1] = 0.0
            >>> mask = Mask.of({"heads": head_mask, "neurons": neuron_mask}, layout)
            >>> mask["heads.0"].tolist()
            [True, False, True, True]
        """
        if not isinstance(layout, Layout):
            raise MaskError(f"expected the sites of a model, liar.discover(model), got a {type(layout).__name__}")
        entries, requested = (mask.masks, mask.requested) if isinstance(mask, Mask) else (mask, None)
        if not isinstance(entries, Mapping):
            raise MaskError(f"{FORMATS}; got a {type(mask).__name__} (liar.Mask.load reads a file)")
        return cls(read_kept(entries, layout), requested)

    @classmethod
    def from_removed(cls, removed: Mapping[str, Sequence[int]], layout: Layout) -> Mask:
        """Make a mask from index lists of what goes, as Torch-Pruning has them; sites they do not name stay whole.

        Args:
            removed: by site name (`"neurons.0"`) indices of units, or by the full name of one of a site's layers indices
                of channels: output channels of a producer, input channels of the consumer. All channels of a unit must be
                there, or none. Layers of one site may all have a list, if the lists agree.
            layout: the sites of the model, see `liar.discover`.

        Raises:
            MaskError: no such site or layer; an index that is out of range or repeated; part of a unit; lists of one site
                that do not agree; or a site that keeps nothing.

        Example:
            >>> layout = liar.discover(model)
            >>> mask = Mask.from_removed({"heads.0": [3], "encoder.layer.1.intermediate.dense": [5, 7]}, layout)
            >>> mask.kept("heads.0"), mask.kept("neurons.1")
            (3, 62)
        """
        return cls(read_removed(removed, layout))


def _mask_of(units: int, kept: list[int]) -> Tensor:
    """Bool [units] from the content of a file; a `ValueError` says what is wrong with it."""
    if type(units) is not int or not 1 <= units <= MOST or type(kept) is not list:
        raise ValueError(f"units={abridged([units])} with kept={type(kept).__name__}")
    if any(type(unit) is not int or not 0 <= unit < units for unit in kept) or len(set(kept)) < len(kept):
        raise ValueError(f"units={units!r} with kept={abridged(kept)}")
    return torch.zeros(units, dtype=torch.bool).index_fill_(0, torch.tensor(kept, dtype=torch.int64), True)
