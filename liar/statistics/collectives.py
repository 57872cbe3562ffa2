"""What accumulators ask of the processes that share a run: `liar.runtime.distributed` answers, through `torch.distributed`."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

from torch import Tensor

T = TypeVar("T")


class Collectives(Protocol):
    """Every process calls the same of these, in the same order; in a single process each gives back what it got."""

    def size(self) -> int:
        """How many processes there are."""

    def rank(self) -> int:
        """The number of this one, from 0."""

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in their order; a few numbers, no tensors."""

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """The value of one process, whatever it is."""

    def add(self, *tensors: Tensor) -> None:
        """Replace tensors by their sums over all processes, in place; they have one shape everywhere."""


class Accumulator(Protocol):
    """What can be merged and sent."""

    def merge(self, other: Any) -> None:
        """Add another's content."""

    def state_dict(self) -> dict[str, Any]:
        """The whole content."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the content."""


def merge_over(processes: Collectives, accumulator: Accumulator) -> None:
    """Merge an accumulator with those of all processes, in their order; the content of one of them comes at a time."""
    own, merged = accumulator.state_dict(), accumulator
    for process in range(processes.size()):
        content = processes.broadcast(own, process)
        if process == 0:
            merged.load_state_dict(content)
        else:
            other = type(accumulator)()
            other.load_state_dict(content)
            merged.merge(other)
