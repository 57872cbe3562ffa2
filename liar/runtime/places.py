"""Where activations are kept: on the device that computes, in host memory, or in files."""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol
from weakref import finalize

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from liar.errors import CheckpointError

# Smaller tensors stay where they are: a copy costs more than it saves.
LITTLE = 2**14
FULL = "free space, choose another run_folder, or set TMPDIR to a larger disk"


class Kept(Protocol):
    """A tensor that is kept elsewhere, until this object is forgotten."""

    def prefetch(self) -> None:
        """Begin to copy it back, where that can happen beside other work."""

    def fetch(self) -> Tensor:
        """The tensor, on the device it came from."""


class Place(Protocol):
    """Somewhere to keep tensors."""

    def keep(self, tensor: Tensor) -> Tensor | Kept:
        """What is kept in place of a tensor: itself, where it stays as it is."""


class Pinned:
    """A copy in pinned host memory. Copies run on a stream of their own, so that the device computes meanwhile."""

    def __init__(self, tensor: Tensor, stream: torch.cuda.Stream) -> None:
        self._device, self._stream = tensor.device, stream
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._coming: tuple[Tensor, torch.cuda.Event] | None = None
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            self._host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)

    def prefetch(self) -> None:
        """Begin to copy it back."""
        if self._coming is None:
            with torch.cuda.stream(self._stream):
                self._coming = self._host.to(self._device, non_blocking=True), self._stream.record_event()

    def fetch(self) -> Tensor:
        """The tensor, which what is computed from now on waits for."""
        self.prefetch()
        assert self._coming is not None
        (tensor, event), self._coming = self._coming, None
        current = torch.cuda.current_stream(self._device)
        current.wait_event(event)
        tensor.record_stream(current)
        return tensor


class OnHost:
    """Keep tensors of a GPU in pinned host memory; those of a CPU are there already."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def keep(self, tensor: Tensor) -> Tensor | Kept:
        """What is kept in place of a tensor."""
        if not tensor.is_cuda or tensor.nbytes < LITTLE:
            return tensor
        if tensor.device not in self._streams:
            self._streams[tensor.device] = torch.cuda.Stream(tensor.device)  # type: ignore[no-untyped-call]
        return Pinned(tensor, self._streams[tensor.device])


class File:
    """A safetensors file with one tensor; it is read through a memory map, and goes when nothing needs it any more."""

    def __init__(self, tensor: Tensor, path: Path) -> None:
        self._path, self._device = path, tensor.device
        finalize(self, _unlink, path, os.getpid())
        try:
            save_file({"value": tensor.detach().contiguous()}, path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot keep activations in {path.parent}: {error}; {FULL}") from error

    def prefetch(self) -> None:
        """The system reads ahead."""

    def fetch(self) -> Tensor:
        """The tensor."""
        try:
            return load_file(self._path, device=str(self._device))["value"]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"activations in {self._path.parent} are gone or damaged: {error}") from error


def _unlink(path: Path, owner: int) -> None:
    """Delete a file in the process that made it: a forked child forgets its copy of what the parent still needs."""
    if os.getpid() == owner:
        path.unlink(missing_ok=True)


class OnDisk:
    """Keep tensors in files of a folder, which several processes may share: on other machines, too, with the same numbers."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._own, self._numbers = folder, secrets.token_hex(8), itertools.count()

    def keep(self, tensor: Tensor) -> Tensor | Kept:
        """What is kept in place of a tensor."""
        if tensor.nbytes < LITTLE:
            return tensor
        return File(tensor, self._folder / f"{self._own}-{os.getpid()}-{next(self._numbers):08d}.safetensors")


def map_tensors(value: Any, function: Callable[[Any], Any], kind: type | tuple[type, ...] = Tensor) -> Any:
    """A value with a function applied to all tensors in it, however deep in tuples, lists and dictionaries.

    With another `kind`, to the objects of these classes.
    """
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, tuple | list):
        items = [map_tensors(each, function, kind) for each in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if type(value) is dict:
        return {name: map_tensors(each, function, kind) for name, each in value.items()}
    return value
