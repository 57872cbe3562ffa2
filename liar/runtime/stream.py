"""The residual stream around a site: where it is captured, what is added to it, and its sum after the site."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter

import torch
from torch import Tensor, nn

from liar.models import Site
from liar.runtime.hooks import Point


def residual_points(block: nn.Module, site: Site) -> dict[str, Point]:
    """What to capture for the stream that the site's output is added to: one point, more in a parallel block."""
    module, argument = site.residual
    points = {"residual": Point(block.get_submodule(module), argument)}
    return points | {f"residual + {name}": Point(block.get_submodule(name), None) for name in site.added_before}


def residual_sum(activations: Mapping[str, Tensor], site: Site) -> Tensor:
    """The stream that the site's output is added to, from the activations at `residual_points`."""
    stream = activations["residual"]
    for name in site.added_before:
        stream = stream + activations[f"residual + {name}"]
    return stream


def added_point(block: nn.Module, site: Site) -> Point:
    """What to capture for what a site adds to the stream: the output of the consumer, to be scaled, or of the norm after it."""
    return Point(block.get_submodule(site.added), None)


def output_scale(block: nn.Module, site: Site) -> Tensor | float:
    """What the consumer's output is multiplied by before it is added to the stream: a number, or one for each channel."""
    scale: Tensor | float = 1.0 if site.output_scale is None else attrgetter(site.output_scale)(block)
    return scale


def by_sequence(value: Tensor, token_mask: Tensor) -> Tensor:
    """An activation as [sequences, length, channels], where a block flattens its tokens to [tokens, channels], too (OPT)."""
    return value.reshape(*token_mask.shape, value.shape[-1])


def sequence_sums(rows: Tensor, token_mask: Tensor) -> Tensor:
    """Sums over the tokens of each sequence: [tokens, channels] and bool [sequences, length] -> [sequences, channels]."""
    return rows.new_zeros(len(token_mask), rows.shape[1]).index_add_(0, token_mask.nonzero()[:, 0], rows)


def widen(value: Tensor) -> Tensor:
    """At least float32: differences and squares of 16-bit streams are not computed in 16 bits."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
