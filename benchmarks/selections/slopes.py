"""How a loss moves when the channels of a site are scaled: of every sequence by itself, where `liar.gradients` has sums."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor, nn

from liar.gradients import by_channel, gradients
from liar.sites import Site, linear


def probe(model: nn.Module) -> nn.Module:
    """A copy to take gradients of: the model's own flags, modes and gradients are never touched."""
    return copy.deepcopy(model).train(False).requires_grad_(False)


def open_from(copied: nn.Module, site: Site) -> None:
    """Record gradients from this site on, and nothing below it."""
    copied.requires_grad_(False)
    block = copied.get_submodule(site.block)
    for edge in site.producers:
        linear(block, edge).weight.requires_grad_(True)


def slopes(loss: Tensor, reads: Sequence[Tensor]) -> list[Tensor]:
    """dL/dm, with m = 1 a factor on a channel where its consumer reads it: [sequences, channels] each, float64.

    It is the sum of x * dL/dx over the tokens of a sequence. Sequences do not see each other, so one backward pass through a
    sum over sequences gives each by itself. A loss that does not look at a site has a slope of zero there.

    Args:
        loss: summed over sequences, a scalar.
        reads: x, what the consumers read, [sequences, length, channels] each.
    """
    return [by_channel(x, slope) for x, slope in zip(reads, gradients(loss, reads), strict=True)]
