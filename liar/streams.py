"""The residual stream around a site: where it is seen, what it becomes, and how much a token of it counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from liar.capture import Point
from liar.sites import Site, linear

# As in the norms of the models: keeps the weight of an all-zero token finite.
EPSILON = 1e-6


def residual(block: nn.Module, site: Site) -> Point:
    """Where the stream that the consumer's output is added to is handed over."""
    module, argument = site.residual
    return Point(block.get_submodule(module), argument)


def around(block: nn.Module, sites: Sequence[Site]) -> dict[str, Point]:
    """The points that `sums` needs."""
    points: dict[str, Point] = {}
    for site in sites:
        points |= {
            f"{site.name} out": Point(linear(block, site.consumer), None),
            f"{site.name} residual": residual(block, site),
        }
    return points


def sums(seen: Mapping[str, Tensor], sites: Sequence[Site], output: Tensor) -> tuple[dict[str, Tensor], bool]:
    """The stream after every site of a block, and whether the block hands its last sum on as it is (pre-norm).

    Such a sum takes no memory of its own: it is the block's output. Where the stream grows like this from block to block,
    tokens are to be weighted by `token_weight`; a post-norm block normalises its sums itself.
    """
    if not sites:
        return {}, False
    found = {site.name: seen[f"{site.name} residual"] + seen[f"{site.name} out"] for site in sites}
    last = sites[-1].name
    same = torch.equal(found[last], output)
    if same:
        found[last] = output
    return found, same


def token_weight(total: Tensor) -> Tensor:
    """1 / mean square of every token: [tokens, channels] -> [tokens].

    A norm reads the stream next, so what counts is a token's error relative to its size.
    """
    return 1 / (total.square().mean(1) + EPSILON)


def by_sequence(rows: Tensor, keep: Tensor) -> Tensor:
    """Sums over the tokens of each sequence: [tokens, channels] and bool [sequences, length] -> [sequences, channels]."""
    return rows.new_zeros(len(keep), rows.shape[1]).index_add_(0, keep.nonzero()[:, 0], rows)


def wide(value: Tensor) -> Tensor:
    """Differences and squares of streams: 16-bit streams are computed with in float32."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
