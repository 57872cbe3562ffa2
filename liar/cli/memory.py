"""The memory of a process of the command line."""

from __future__ import annotations

import ctypes

# Of glibc's malloc.h.
M_MMAP_THRESHOLD = -3
LARGE = 2**20


def map_large_tensors(larger_than: int = LARGE) -> None:
    """Let the C library map large blocks by themselves, and give them back to the system when they are freed.

    As it is, it soon takes blocks of up to 32 MB from its heap, where tensors of many different sizes leave gaps that no other
    fits in: the process takes up to twice the memory of its tensors (docs/scaling.md). This is for a process of our own; in
    others it is the owner's choice (`MALLOC_MMAP_THRESHOLD_`). C libraries that do not know it do nothing.

    Args:
        larger_than: bytes; a megabyte, if left out.
    """
    try:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, larger_than)
    except (OSError, AttributeError, TypeError):  # musl, macOS, Windows
        return
