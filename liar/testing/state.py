"""The state of a user's model, which a failed call must leave as it was, to the bit."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def model_state(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a failed call must leave as it was: compare two of them with `assert_same_state`.

    Example:
        >>> from liar.testing import model_state
        >>> sorted(model_state(model))[:3]
        ['attributes', 'classes', 'configuration']
    """
    modules = dict(model.named_modules())
    config: Any = getattr(model, "config", None)
    return {
        "weights": {name: value.detach().clone() for name, value in model.state_dict().items()},
        "parameter objects": {name: id(value) for name, value in model.named_parameters()},
        "requires_grad": {name: value.requires_grad for name, value in model.named_parameters()},
        "training modes": {name: module.training for name, module in modules.items()},
        "attributes": {
            name: {key: value for key, value in vars(module).items() if isinstance(value, (int, str))}
            for name, module in modules.items()
        },
        "classes": {name: type(module) for name, module in modules.items()},
        "hooks": {
            name: [list(hooks) for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)]
            for name, module in modules.items()
        },
        "forward overrides": [name for name, module in modules.items() if "forward" in vars(module)],
        "configuration": copy.deepcopy(config.to_dict()) if config is not None else None,
        "random state": torch.get_rng_state(),
        "gradient mode": torch.is_grad_enabled(),
    }


def assert_same_state(model: nn.Module, before: Mapping[str, Any]) -> None:
    """Fail if anything that `model_state` recorded of a model has changed since; weights are compared bit for bit.

    Args:
        model: the model.
        before: what `model_state` returned for it.

    Raises:
        AssertionError: something has changed; it says what.

    Example:
        >>> from liar.testing import assert_same_state, model_state
        >>> before = model_state(model)
        >>> _ = liar.select(model, calib, keep=0.5, progress=False)
        >>> assert_same_state(model, before)
    """
    after = model_state(model)
    for what, old in before.items():
        if what == "weights":
            expect(after[what].keys() == old.keys(), "the state dict has other entries than before")
            for name, value in old.items():
                same = value.dtype == after[what][name].dtype and same_bits(value, after[what][name])
                expect(same, f"the weights have changed: {name}")
        elif what == "random state":
            expect(torch.equal(old, after[what]), "the random state has changed")
        else:
            expect(after[what] == old, f"the model's {what} have changed: {_difference(old, after[what])}")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, with NaN equal to itself."""
    return a.shape == b.shape and torch.equal(*(each.reshape(-1).view(torch.uint8) for each in (a, b)))


def _difference(old: Any, new: Any) -> Any:
    if isinstance(old, dict) and isinstance(new, dict):
        return {key: (old.get(key), new.get(key)) for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
    return old, new


def expect(condition: bool, message: str) -> None:
    """`assert` that stays with `python -O`."""
    if not condition:
        raise AssertionError(message)
