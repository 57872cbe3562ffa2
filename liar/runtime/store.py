"""The one owner of everything that outlives a batch: streams, targets, replayed outputs, recorded arguments."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from liar.runtime.places import File, Kept, Pinned, Place, map_tensors

_ELSEWHERE = (Pinned, File)


class ActivationStore:
    """Values by series and batch, put and taken one batch at a time: tensors, and tuples, lists and dictionaries of them.

    Args:
        place: where tensors are kept; where they were computed, if left out.

    Example:
        >>> store = ActivationStore()
        >>> store.put("dense stream", 0, torch.zeros(2, 3))
        >>> store.share("dense stream", "pruned stream")
        >>> store.get("pruned stream", 0).shape, store.batches("dense stream")
        (torch.Size([2, 3]), [0])
    """

    def __init__(self, place: Place | None = None) -> None:
        self._series: dict[str, dict[int, Any]] = {}
        self._place = place
        # What is kept of tensors that are still in use, so that one that is put twice is copied once.
        self._copies: MutableMapping[Tensor, tuple[int, Tensor | Kept]] = WeakTensorKeyDictionary()

    def put(self, series: str, batch: int, value: Any) -> None:
        """Keep a value; an earlier one of the same series and batch is dropped. Tensors must not be changed afterwards."""
        kept = value if self._place is None else map_tensors(value, self.keep)
        self._series.setdefault(series, {})[batch] = kept

    def get(self, series: str, batch: int) -> Any:
        """The value of a series for one batch. That of the next batch is likely to be wanted soon."""
        values = self._series[series]
        if self._place is None:
            return values[batch]
        value = map_tensors(values[batch], self.fetch, _ELSEWHERE)
        map_tensors(values.get(batch + 1), lambda kept: kept.prefetch(), _ELSEWHERE)
        return value

    def keep(self, tensor: Tensor) -> Tensor | Kept:
        """What is kept of a tensor that belongs to no series, as long as the result is not forgotten."""
        if self._place is None:
            return tensor
        version, kept = self._copies.get(tensor, (None, tensor))
        if version != (now := _version(tensor)):  # new, or changed in place since
            kept = self._place.keep(tensor)
            if kept is not tensor:
                self._copies[tensor] = now, kept
        return kept

    def fetch(self, kept: Tensor | Kept) -> Tensor:
        """The tensor that `keep` was given."""
        if isinstance(kept, Tensor):
            return kept
        tensor = kept.fetch()
        self._copies[tensor] = _version(tensor), kept
        return tensor

    def batches(self, series: str) -> list[int]:
        """The batches of which a series has a value, in order; none for an unknown series."""
        return sorted(self._series.get(series, {}))

    def share(self, series: str, other: str) -> None:
        """Let `other` begin with the values of `series`, without copies; each changes for itself from then on."""
        self._series[other] = dict(self._series.get(series, {}))

    def discard(self, *series: str) -> None:
        """Drop whole series, whether they are there or not."""
        for name in series:
            self._series.pop(name, None)

    def names(self) -> list[str]:
        """The series that are kept."""
        return sorted(self._series)


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; one of inference mode does not say, and is not changed outside of it."""
    return 0 if tensor.is_inference() else tensor._version
