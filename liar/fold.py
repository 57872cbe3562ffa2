"""Putting an answer into a layer: the solution of the solve becomes the consumer's weight and bias, in its own dtype."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from liar.errors import ModelError
from liar.solve import Solution


def start(consumer: nn.Linear) -> tuple[Tensor, Tensor]:
    """What the consumer computes if nothing is done: weight [in, out] and bias [out] (zeros if it has none), float64."""
    weight = consumer.weight.detach().double().T
    bias = weight.new_zeros(weight.shape[1]) if consumer.bias is None else consumer.bias.detach().double()
    return weight, bias


def fold(consumer: nn.Linear, solution: Solution, *, create_bias: bool = False) -> None:
    """Write a solution into a consumer that has already been cut to the kept channels.

    The weights are replaced by new parameters (the old ones may be shared with another module). A layer without bias
    gets one only with `create_bias`.

    Raises:
        ModelError: the answer overflows the layer's dtype.
    """
    dtype, trained = consumer.weight.dtype, consumer.weight.requires_grad
    weight, bias = solution.weight.T.to(dtype).contiguous(), torch.clone(solution.bias.to(dtype))
    if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
        raise ModelError(f"the new weights do not fit into {dtype}: use bfloat16 or float32, or a larger ridge")
    consumer.weight = nn.Parameter(weight, requires_grad=trained)
    if create_bias or consumer.bias is not None:
        consumer.bias = nn.Parameter(bias, requires_grad=trained)
