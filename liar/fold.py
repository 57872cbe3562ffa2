"""Putting an answer into a layer: the solution of the solve becomes the consumer's weight and bias, in its own dtype."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from liar.errors import ModelError


def start(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """What a layer computes if nothing is done: weight [in, out] and bias [out] (zeros if it has none), float64."""
    weight = layer.weight.detach().double().T
    bias = weight.new_zeros(weight.shape[1]) if layer.bias is None else layer.bias.detach().double()
    return weight, bias


def fold(layer: nn.Linear, weight: Tensor, bias: Tensor, *, create_bias: bool = False) -> None:
    """Write new weights [in, out] and bias [out] into a layer that has already been cut to the kept channels.

    The weights are replaced by new parameters (the old ones may be shared with another module). A layer without bias
    gets one only with `create_bias`.

    Raises:
        ModelError: the answer overflows the layer's dtype.
    """
    dtype, trained = layer.weight.dtype, layer.weight.requires_grad
    weight, bias = weight.T.to(dtype).contiguous(), bias.to(dtype).clone()
    if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
        raise ModelError(f"the new weights do not fit into {dtype}: use bfloat16 or float32, or a larger ridge")
    layer.weight = nn.Parameter(weight, requires_grad=trained)
    if create_bias or layer.bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=trained)
