"""What a step may ask for around a site, and where that is found in a block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from torch import Tensor, nn

from liar.errors import check_choice
from liar.models import Site
from liar.runtime import Point, added_point, by_sequence, output_scale, residual_points, residual_sum

# "residual" is the residual stream before the site, "stream" the one after it: with the consumer's output, scaled or normalised
# as the block does.
Capture = Literal["producer_input", "consumer_input", "consumer_output", "residual", "stream"]


def capture_points(block: nn.Module, site: Site, captures: Sequence[Capture]) -> dict[str, Point]:
    """What has to be captured of a block for some captures of one site."""
    for capture in captures:
        check_choice("capture", capture, get_args(Capture))
    points: dict[str, Point] = {}
    consumer = block.get_submodule(site.consumer.module)
    if "producer_input" in captures:
        points["producer_input"] = Point(block.get_submodule(site.producers[0].module), 0)
    if "consumer_input" in captures:
        points["consumer_input"] = Point(consumer, 0)
    if "consumer_output" in captures:
        points["consumer_output"] = Point(consumer, None)
    if "stream" in captures:
        points["added"] = added_point(block, site)
    if "residual" in captures or "stream" in captures:
        points |= residual_points(block, site)
    return points


def read_captures(
    activations: Mapping[str, Tensor], block: nn.Module, site: Site, captures: Sequence[Capture], token_mask: Tensor
) -> dict[str, Tensor]:
    """The captures of one site, [sequences, length, channels] each, from the activations at its `capture_points`."""
    result: dict[str, Tensor] = {name: activations[name] for name in captures if name not in ("residual", "stream")}
    if "residual" in captures or "stream" in captures:
        residual = residual_sum(activations, site)
        if "residual" in captures:
            result["residual"] = residual
        if "stream" in captures:
            # As the block does it: with a scale of 1 this is not another rounding.
            added, scale = activations["added"], output_scale(block, site)
            result["stream"] = residual + (added if site.output_scale is None else added * scale)
    return {name: by_sequence(value, token_mask) for name, value in result.items()}
