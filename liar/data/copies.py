"""Copies among calibration texts: what is held out must not be among what was fitted, cut elsewhere or not."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

# Two pieces of text with so many tokens in a row in common, again and again, are copies: by chance that hardly happens.
RUN = 8
NEARLY = 0.9
# Odd, so that no token is lost modulo 2^64 (the multiplier of Knuth's 64-bit linear congruential generator).
MULTIPLIER = np.uint64(6364136223846793005)

Numbers = NDArray[np.int64]


def find_copies(ids: Numbers, sequence: Numbers, piece: Numbers) -> tuple[Numbers, Numbers]:
    """Pieces of text that are copies of each other, or nearly so.

    A piece is a copy if more than half of the runs of `RUN` tokens that begin in it have come before: it belongs to the piece
    with most of them. And two pieces belong together if that many of the runs of the shorter one are in the other. Copies of
    copies belong together as well. A run ends with its sequence.

    Where this would put more than half of all text together (a prompt before every text, overlapping windows, few words), only
    pieces belong together of which the shorter one has nearly all its runs (`NEARLY`) in the other.

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
    hashes, owner = _runs(ids, sequence, piece, sizes)
    runs = np.bincount(owner, minlength=total)
    _, first, of_run = np.unique(hashes, return_index=True, return_inverse=True)
    source = owner[first[of_run]]
    new = np.bincount(owner[first], minlength=total)
    pairs, counts = np.unique(np.stack([owner, source])[:, source != owner], axis=1, return_counts=True)
    old, most = np.bincount(pairs[0], counts, minlength=total), np.zeros(total)
    np.maximum.at(most, pairs[0], counts)
    is_copy = (2 * old > runs)[pairs[0]] & (counts == most[pairs[0]])
    shorter = np.minimum(*runs[pairs])
    leader = _first_of_group(pairs[:, is_copy | (2 * counts > shorter)], total)
    if 2 * np.bincount(leader, sizes).max() > len(ids):
        leader = _first_of_group(pairs[:, counts >= NEARLY * shorter], total)
    # The first and the last run of a copy hold the special tokens around it, and are new wherever it is cut.
    new = np.where(leader == np.arange(total), new, np.maximum(new - 2, 0))
    return leader, -(-sizes * new // runs)


def _first_of_group(copies: Numbers, total: int) -> Numbers:
    """The first piece of the group of every piece: [2, pairs] that belong together -> [pieces]."""
    links = coo_array((np.ones(copies.shape[1], dtype=bool), (copies[0], copies[1])), shape=(total, total))
    _, group = connected_components(links, directed=False)
    leaders = np.full(int(group.max()) + 1, total)
    np.minimum.at(leaders, group, np.arange(total))
    return leaders[group]


def _runs(ids: Numbers, sequence: Numbers, piece: Numbers, sizes: Numbers) -> tuple[NDArray[np.uint64], Numbers]:
    """A hash of every run of tokens, and the piece it begins in.

    Rulers and tables of different texts are alike, so runs that repeat up to four tokens do not count. A piece in which no
    other run begins has one: its first, or at the end of a sequence the last of that, and its place there.
    """
    starts, ends = (np.searchsorted(sequence, sequence, side=side) for side in ("left", "right"))
    place = np.arange(len(ids))
    whole = place + RUN <= ends
    counts = whole & ~_is_periodic(ids)
    is_first = np.diff(piece, prepend=-1) != 0
    begins = counts | (is_first & (np.bincount(piece[counts], minlength=len(sizes)) == 0)[piece])
    start = np.where(whole, place, np.maximum(ends - RUN, starts))[begins]
    hashes = np.where(whole, 0, 1 + ends - place)[begins].astype(np.uint64)
    for offset in range(RUN):
        inside = start + offset < ends[begins]
        token = np.where(inside, ids[np.minimum(start + offset, len(ids) - 1)], -1)
        hashes = (hashes ^ token.astype(np.uint64)) * MULTIPLIER
        hashes ^= hashes >> np.uint64(29)
    return hashes, piece[begins]


def _is_periodic(ids: Numbers) -> NDArray[np.bool_]:
    """Whether a run that begins at a token says the same one to four tokens again and again."""
    found = np.zeros(len(ids), dtype=bool)
    for period in range(1, min(RUN // 2, len(ids) - 1) + 1):
        same = np.zeros(len(ids), dtype=np.int64)
        same[:-period] = ids[:-period] == ids[period:]
        total = np.concatenate([np.zeros(1, dtype=np.int64), same.cumsum()])
        end = np.minimum(np.arange(len(ids)) + RUN - period, len(ids))
        found |= total[end] - total[: len(ids)] == RUN - period
    return found
