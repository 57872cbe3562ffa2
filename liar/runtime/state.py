"""The state of the user's model: changed for a run, and restored whatever happens."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from liar.errors import ModelError

_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


@contextmanager
def exclusive(model: nn.Module) -> Iterator[None]:
    """Let one thread at a time work with a model, in torch's ordinary state.

    Hooks, training flags and flags of gradients are the model's own, so another thread has to wait. What the caller has set
    for the code around (inference mode, autocast, a default device or dtype, lower precision of matrix products) would round
    statistics, or leave parameters that nothing can train; it is back when the block ends.

    Raises:
        ModelError: torch's default device is the meta device, where nothing is computed.
    """
    if torch.get_default_device().type == "meta":
        raise ModelError("torch's default device is meta, where nothing is computed: call this outside of it")
    with _LOCKS_LOCK:
        lock = _LOCKS.setdefault(model, threading.RLock())
    with lock, ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for kind in {"cpu", *(p.device.type for p in model.parameters())} - {"meta"}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest")
        yield


@contextmanager
def preserve_model_state(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, outputs by name; flags and the random state are restored whatever happens."""
    config: Any = getattr(model, "config", None)
    by_name = getattr(config, "return_dict", True)
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            model.eval()
            if not by_name:
                config.return_dict = True
            yield
    finally:
        if not by_name:
            config.return_dict = by_name
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
