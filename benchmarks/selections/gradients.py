"""Gradients of a loss with respect to factors on the channels of a site, for every sequence by itself."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor, nn

from liar.models import Site, layer_of
from liar.selection.gradients import by_channel, gradients


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy to take gradients of: the model's own flags, modes and gradients are never touched."""
    return copy.deepcopy(model).train(False).requires_grad_(False)


def record_from(copied: nn.Module, site: Site) -> None:
    """Record gradients from this site on, and nothing below it."""
    copied.requires_grad_(False)
    block = copied.get_submodule(site.block)
    for edge in site.producers:
        layer_of(block, edge).weight.requires_grad_(True)


def channel_gradients(loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """dL/dm, with m = 1 a factor on a channel where its consumer reads it: [sequences, channels] each, float64.

    It is the sum of x * dL/dx over the tokens of a sequence. Sequences do not see each other, so one backward pass through a
    sum over sequences gives each by itself. A loss that does not depend on a site has a gradient of zero there.

    Args:
        loss: summed over sequences, a scalar.
        inputs: x, the consumers' inputs, [sequences, length, channels] each.
    """
    return [by_channel(x, gradient) for x, gradient in zip(inputs, gradients(loss, inputs), strict=True)]
