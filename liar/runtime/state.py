"""The state of the user's model: changed for a run, and restored whatever happens."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from liar.errors import ModelError
from liar.models import (
    Layout,
    check_default_device,
    check_model,
    compute_device,
    layout_with_weights,
    take_weights_away,
)

_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


@contextmanager
def exclusive(model: nn.Module) -> Iterator[None]:
    """Let one thread at a time work with a model, in torch's ordinary state.

    Hooks, training flags and flags of gradients are the model's own, so another thread has to wait. What the caller has set
    for the code around (inference mode, autocast, a default device or dtype, lower precision of matrix products) would round
    statistics, or leave parameters that nothing can train; it is back when the block ends.

    Raises:
        ModelError: it is no model, or inside a wrapper; or torch's default device is the meta device.
    """
    check_model(model)
    check_default_device()
    with _LOCKS_LOCK:
        lock = _LOCKS.setdefault(model, threading.RLock())
    with lock, ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for kind in {"cpu", compute_device(model).type, *(p.device.type for p in model.parameters())} - {"meta"}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(_ordinary_settings())
        yield


def layout_when_free(model: nn.Module) -> Layout:
    """The sites of a model, which no other thread works with meanwhile.

    Raises:
        ModelError: as `exclusive`, and as `layout_with_weights`.
    """
    with exclusive(model):
        return layout_with_weights(model)


@dataclass
class _Settings:
    """Settings of the process that were found by the first of the threads that work now, and how many these are."""

    threads: int = 0
    dtype: torch.dtype = torch.float32
    precision: str | None = None


_SETTINGS = _Settings()


@contextmanager
def _ordinary_settings() -> Iterator[None]:
    """The default type float32 and full precision of products; the last thread that works puts back what the first found."""
    with _LOCKS_LOCK:
        if not _SETTINGS.threads:
            _SETTINGS.dtype = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)
            _SETTINGS.precision = _matmul_precision("highest")
        _SETTINGS.threads += 1
    try:
        yield
    finally:
        with _LOCKS_LOCK:
            _SETTINGS.threads -= 1
            if not _SETTINGS.threads:
                torch.set_default_dtype(_SETTINGS.dtype)
                if _SETTINGS.precision is not None:
                    _matmul_precision(_SETTINGS.precision)


def _matmul_precision(wanted: str) -> str | None:
    """Set the precision of float32 products; what it was, or None where the user sets it in torch's newer way."""
    try:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(wanted)
    except RuntimeError:
        return None
    return before


def _forget_locks() -> None:
    """In a forked child: threads that held a lock are not there."""
    global _LOCKS_LOCK
    _LOCKS_LOCK = threading.Lock()
    _LOCKS.clear()
    _SETTINGS.threads = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


@contextmanager
def preserve_model_state(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, outputs by name; flags and the random state are restored whatever happens."""
    config: Any = getattr(model, "config", None)
    by_name = getattr(config, "return_dict", True)
    modes = [(module, module.training) for module in model.modules()]
    used = (compute_device(model), *(parameter.device for parameter in model.parameters()))
    devices = sorted({device.index or 0 for device in used if device.type == "cuda"})
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
        take_weights_away(model)


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
    # By name: the parameters of a dispatched model are others after every pass.
    flags = [
        (module, name, parameter.requires_grad)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]
    # The user may be in inference mode, where nothing can be differentiated.
    with torch.inference_mode(False), preserve_model_state(model):
        try:
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            for weight in weights:
                weight.requires_grad_(True)
            with torch.enable_grad():
                yield
        finally:
            for module, name, flag in flags:
                module.get_parameter(name).requires_grad_(flag)
