"""Copies among calibration texts: what is held out must not be among what was fitted, cut elsewhere or not."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

# Two pieces of text with so many tokens in a row in common, again and again, are copies: by chance that hardly happens.
RUN = 8
# Odd, so that no token is lost modulo 2^64 (the multiplier of Knuth's 64-bit linear congruential generator).
MULTIPLIER = np.uint64(6364136223846793005)

Numbers = NDArray[np.int64]


def find_copies(ids: Numbers, sequence: Numbers, piece: Numbers) -> tuple[Numbers, Numbers]:
    """Pieces of text that are copies of each other, or nearly so.

    A piece is a copy if more than half of the runs of `RUN` tokens that begin in it have come before: it belongs to the piece
    with most of them. And two pieces belong together if that many of the runs of the shorter one are in the other. Copies of
    copies belong together as well. A run ends with its sequence.

    Args:
        ids: [tokens], of all sequences one after the other.
        sequence: [tokens], the sequence of every token, ascending.
        piece: [tokens], the piece of every token, ascending from 0; a sequence is one piece or several.

    Returns:
        For every piece the first one it is a copy of (itself if there is none), and how many of its tokens are not in an
        earlier piece, or earlier in this one: both [pieces].

    Example:
        >>> sequence = np.array([0, 0, 1, 1, 2, 2])
        >>> find_copies(np.array([5, 6, 5, 6, 7, 8]), sequence, sequence)
        (array([0, 0, 2]), array([2, 0, 2]))
    """
    total = int(piece[-1]) + 1
    sizes = np.bincount(piece, minlength=total)
    hashes, owner = _runs(ids, sequence, piece)
    runs = np.bincount(owner, minlength=total)
    _, first, of_run = np.unique(hashes, return_index=True, return_inverse=True)
    source = owner[first[of_run]]
    new = np.bincount(owner[first], minlength=total)
    pairs, counts = np.unique(np.stack([owner, source])[:, source != owner], axis=1, return_counts=True)
    old, most = np.bincount(pairs[0], counts, minlength=total), np.zeros(total)
    np.maximum.at(most, pairs[0], counts)
    is_copy = (2 * old > runs)[pairs[0]] & (counts == most[pairs[0]])
    copies = pairs[:, is_copy | (2 * counts > np.minimum(*runs[pairs]))]
    links = coo_array((np.ones(copies.shape[1], dtype=bool), (copies[0], copies[1])), shape=(total, total))
    _, group = connected_components(links, directed=False)
    leaders = np.full(int(group.max()) + 1, total)
    np.minimum.at(leaders, group, np.arange(total))
    return leaders[group], -(-sizes * new // runs)


def _runs(ids: Numbers, sequence: Numbers, piece: Numbers) -> tuple[NDArray[np.uint64], Numbers]:
    """A hash of every run of tokens, and the piece it begins in.

    A piece at the end of a sequence, in which no whole run begins, has one: the last of the sequence, and its place there.
    """
    starts, ends = (np.searchsorted(sequence, sequence, side=side) for side in ("left", "right"))
    place = np.arange(len(ids))
    whole = place + RUN <= ends
    begins = whole | (np.diff(piece, prepend=-1) != 0)
    start = np.where(whole, place, np.maximum(ends - RUN, starts))[begins]
    hashes = np.where(whole, 0, 1 + ends - place)[begins].astype(np.uint64)
    for offset in range(RUN):
        inside = start + offset < ends[begins]
        token = np.where(inside, ids[np.minimum(start + offset, len(ids) - 1)], -1)
        hashes = (hashes ^ token.astype(np.uint64)) * MULTIPLIER
        hashes ^= hashes >> np.uint64(29)
    return hashes, piece[begins]
