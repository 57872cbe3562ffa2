"""The state of the user's model: changed for a run, and restored whatever happens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from liar.errors import ModelError


@contextmanager
def preserve_model_state(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; training flags and the random state are restored whatever happens."""
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def record_gradients(model: nn.Module, weights: Sequence[Tensor]) -> Iterator[None]:
    """Record gradients of the given weights, and of all that is computed with them; the model's state is restored.

    Raises:
        ModelError: parameters that gradients cannot be taken of.
    """
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ModelError(
            f"{type(model).__name__}: expected parameters that gradients can be taken of, got some that were made inside "
            "torch.inference_mode: load the model outside of it"
        )
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    # The user may be in inference mode, where nothing can be differentiated.
    with torch.inference_mode(False), preserve_model_state(model):
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            for weight in weights:
                weight.requires_grad_(True)
            with torch.enable_grad():
                yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
