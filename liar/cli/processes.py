"""Runs that torchrun has started in several processes: they find each other, and the first one speaks for all."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from liar.errors import OptionError

# Subcommands that several processes can share.
SHARED = ("prune", "select", "reconstruct", "replay")
# While one process solves or writes, the others wait as long as it takes; that one is gone is noticed at once.
PATIENCE = timedelta(days=7)


def size() -> int:
    """How many processes torchrun has started: 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if {"WORLD_SIZE", "RANK", "MASTER_ADDR"} <= os.environ.keys() else 1


def is_first() -> bool:
    """Whether this process is the one that speaks."""
    return size() == 1 or os.environ["RANK"] == "0"


def be_silent() -> None:
    """Print nothing and show no bars, but for what Python itself says of a crash."""
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (open as long as the process lives)
    os.environ["TQDM_DISABLE"] = "1"


def check_command(name: str | None) -> None:
    """Refuse what several processes would only do several times.

    Raises:
        OptionError: says what they can share.
    """
    if size() > 1 and name not in (None, *SHARED):
        raise OptionError(
            f"liar {name}: torchrun has started {size()} processes, but this command is for one; several can share "
            f"{', '.join(SHARED)}"
        )


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Let the processes of torchrun work together: with gloo on a CPU, with NCCL on the GPUs, one for each.

    If one of them fails, all of them do, with its error.

    Args:
        device: of the model, as the option says.

    Raises:
        OptionError: one GPU is named for all.
    """
    from torch import cuda, distributed  # noqa: PLC0415 (help needs no torch)

    from liar.runtime.distributed import together  # noqa: PLC0415 (help needs no torch)

    if size() == 1 or distributed.is_initialized():
        with together():
            yield
        return
    kind, _, index = device.partition(":")
    if index:
        raise OptionError(f"device={device!r} is one device for {size()} processes: expected {kind!r}, of which each takes one")
    if kind == "cuda":
        cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=PATIENCE)
    try:
        with together():
            yield
    finally:
        distributed.destroy_process_group()
