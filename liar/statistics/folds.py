"""Statistics by fold of the calibration data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from liar.statistics.collectives import Collectives
from liar.statistics.factor import Factor
from liar.statistics.moments import Moments
from liar.statistics.normal import Normal

# Rows per channel from which one held-out fold is enough to choose a ridge; and rows in that fold from which it is enough,
# however many channels there are: each row has as many errors as the layer has outputs.
PLENTY = 10
HELD_OUT = 2_000


@dataclass(frozen=True)
class TokenIndex:
    """Which positions of a batch are real tokens, sorted by fold.

    Attributes:
        order: int64 [tokens], positions in the flattened batch.
        sizes: how many of them belong to each fold.
    """

    order: Tensor
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, token_mask: Tensor, fold: Tensor, folds: int) -> TokenIndex:
        """From `token_mask` bool [sequences, length] and the fold of each real token, int64 [tokens]."""
        order = token_mask.flatten().nonzero().squeeze(1)[fold.argsort(stable=True)]
        return cls(order, tuple(torch.bincount(fold, minlength=folds).tolist()))

    def gather(self, value: Tensor) -> Tensor:
        """[sequences, length, channels] -> [tokens, channels]."""
        return value.flatten(0, 1).index_select(0, self.order)


class Folds:
    """One accumulator per fold of the calibration data, so that a fit can be tested on the fold it has not seen.

    Args:
        folds: how many.
        kind: `Moments` or `Factor`.
        origins: by fold, the rows that earlier processes have, where several share the data.
    """

    def __init__(self, folds: int, kind: type[Moments] | type[Factor] = Moments, origins: Sequence[int] | None = None) -> None:
        self._kind = kind
        self._parts = self._several([0] * folds if origins is None else origins)

    def update(self, z: Tensor, t: Tensor, tokens: TokenIndex, weight: Tensor | None = None) -> None:
        """Add the real tokens of a batch.

        Args:
            z: [sequences, length, channels].
            t: [sequences, length, out].
            tokens: which of them are real, by fold.
            weight: [sequences, length]; 1 each if left out, then always.
        """
        rows = z.flatten(0, 1), t.flatten(0, 1), None if weight is None else weight.flatten()
        for part, only in zip(self._parts, torch.split(tokens.order, list(tokens.sizes)), strict=True):
            if len(only):
                part.update(*rows, only=only)

    def merge(self, other: Folds) -> None:
        """Add another's rows, fold by fold. `other` keeps its content."""
        for mine, theirs in zip(self._parts, other._parts, strict=True):
            mine.merge(theirs)

    def reduce(self, processes: Collectives) -> None:
        """Add the rows of all processes, fold by fold: once, before anything is factorised."""
        self._kind.reduce_all(self._parts, processes)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later."""
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the content by what `state_dict` gave."""
        self._parts = self._several([0] * len(self._parts))
        for part, content in zip(self._parts, state["parts"], strict=True):
            if content:
                part.load_state_dict(content)

    def normals(self, *, affine: bool, channels: int) -> tuple[Normal, list[tuple[Normal, Normal]]]:
        """The normal equations of all rows, and pairs (all but one fold, that fold) of every fold that has rows.

        The fewer rows, the more an answer depends on which of them were held out; where there are plenty, one pair is given.
        None is if one fold has all rows.
        """
        parts = [part for part in self._parts if part.count]
        if len(parts) < 2:
            return self._joined(self._parts).normal(affine=affine), []
        plenty = sum(part.count for part in parts) >= PLENTY * channels or parts[0].count >= HELD_OUT
        held_out = parts[:1] if plenty else parts
        rest = [self._joined([part for part in parts if part is not held]) for held in held_out]
        splits = [
            (fitted.normal(affine=affine), held.normal(affine=affine)) for fitted, held in zip(rest, held_out, strict=True)
        ]
        rest[0].merge(parts[0])
        return rest[0].normal(affine=affine), splits

    def _several(self, origins: Sequence[int]) -> list[Any]:
        return list(self._kind.several(origins))

    def _joined(self, parts: list[Any]) -> Any:
        joined = self._kind()
        for part in parts:
            joined.merge(part)
        return joined
