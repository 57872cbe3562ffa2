"""The one owner of everything that outlives a batch: streams, targets, replayed outputs, recorded arguments."""

from __future__ import annotations

from typing import Any


class ActivationStore:
    """Values by series and batch, put and taken one batch at a time.

    Everything stays where it was computed. Only this class decides where values are kept, so that another place is a change
    of `put` and `get` alone.

    Example:
        >>> store = ActivationStore()
        >>> store.put("dense stream", 0, torch.zeros(2, 3))
        >>> store.share("dense stream", "pruned stream")
        >>> store.get("pruned stream", 0).shape, store.batches("dense stream")
        (torch.Size([2, 3]), [0])
    """

    def __init__(self) -> None:
        self._series: dict[str, dict[int, Any]] = {}

    def put(self, series: str, batch: int, value: Any) -> None:
        """Keep a value; an earlier one of the same series and batch is dropped."""
        self._series.setdefault(series, {})[batch] = value

    def get(self, series: str, batch: int) -> Any:
        """The value of a series for one batch."""
        return self._series[series][batch]

    def batches(self, series: str) -> list[int]:
        """The batches of which a series has a value, in order; none for an unknown series."""
        return sorted(self._series.get(series, {}))

    def share(self, series: str, other: str) -> None:
        """Let `other` begin with the values of `series`, without copies; each changes for itself from then on."""
        self._series[other] = dict(self._series[series])

    def discard(self, *series: str) -> None:
        """Drop whole series, whether they are there or not."""
        for name in series:
            self._series.pop(name, None)

    def names(self) -> list[str]:
        """The series that are kept."""
        return sorted(self._series)
