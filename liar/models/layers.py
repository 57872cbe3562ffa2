"""One view of every layer that holds a weight: the only place that knows how a layer stores it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from liar.errors import ModelError
from liar.models.plain import set_parameters

Axis = Literal["in", "out"]


@dataclass(frozen=True)
class Storage:
    """How a class of layers stores its weight.

    Attributes:
        axes: the axis of each dimension of the stored weight.
        sizes: axis -> attribute of the module with the number of channels.
    """

    axes: tuple[Axis, Axis]
    sizes: dict[Axis, str]

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as [out, in]."""
        return self.axes == ("out", "in")


STORAGE: dict[type[nn.Module], Storage] = {
    nn.Linear: Storage(("out", "in"), {"in": "in_features", "out": "out_features"}),
    Conv1D: Storage(("in", "out"), {"in": "nx", "out": "nf"}),
}


@dataclass(frozen=True)
class LayerView:
    """A linear layer with its weight read and written as a matrix [in, out], however the module stores it.

    Example:
        >>> layer = LayerView.of(torch.nn.Linear(3, 2))
        >>> layer.matrix.shape, layer.size("out")
        (torch.Size([3, 2]), 2)
    """

    module: nn.Module
    storage: Storage

    @classmethod
    def of(cls, module: nn.Module, name: str = "the layer") -> LayerView:
        """The view of a module.

        Raises:
            ModelError: the module is of no known class, its weight is quantised, or computed from other parameters.
        """
        storage = storage_of(module)
        if storage is not None and not {"weight", "bias"} <= module._parameters.keys():
            raise ModelError(
                f"the weight or bias of {name} is computed from other parameters (torch.nn.utils.prune, a weight norm, a "
                "parametrization), so it cannot be rewritten: make it permanent first, with torch.nn.utils.prune.remove(layer, "
                '"weight") or torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")'
            )
        weight: Any = module.weight if storage else None
        if storage is None or not _is_ordinary(weight):
            classes = " or ".join(kind.__name__ for kind in STORAGE)
            raise ModelError(
                f"{name} is a {_class_name(module)}, expected {classes} in float32, float64, bfloat16 or float16. "
                "Quantised or wrapped layers cannot be rewritten: load the model unquantised (or merge its adapters), "
                "reconstruct it, then quantise"
            )
        return cls(module, storage)

    @property
    def weight(self) -> nn.Parameter:
        """The parameter as the module stores it."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias [out], or None where the layer has none."""
        return self.module.bias  # type: ignore[return-value]

    @property
    def matrix(self) -> Tensor:
        """The weight as [in, out], detached; it shares memory with the parameter."""
        return self.as_matrix(self.weight.detach())

    def as_matrix(self, stored: Tensor) -> Tensor:
        """A tensor of the weight's shape (a gradient, say) as [in, out]."""
        return stored.T if self.storage.transposed else stored

    def size(self, axis: Axis) -> int:
        """Number of input or output channels."""
        return self.weight.shape[self.storage.axes.index(axis)]

    def initial_weights(self) -> tuple[Tensor, Tensor]:
        """What the layer computes before any repair: weight [in, out] and bias [out] (zeros if it has none), float64."""
        weight = self.matrix.double()
        bias = weight.new_zeros(weight.shape[1]) if self.bias is None else self.bias.detach().double()
        return weight, bias

    def select(self, axis: Axis, channels: Tensor) -> None:
        """Keep only some input or output channels, int64 indices. Parameters are replaced, never changed in place."""
        channels = channels.to(self.weight.device)
        kept = self.weight.detach().index_select(self.storage.axes.index(axis), channels)
        self._replace("weight", kept)
        setattr(self.module, self.storage.sizes[axis], len(channels))
        if self.bias is not None:
            bias = self.bias.detach()
            self._replace("bias", bias.index_select(0, channels) if axis == "out" else bias.clone())

    def write(self, matrix: Tensor, bias: Tensor, *, create_bias: bool = False) -> None:
        """Replace the weight by `matrix` [in, out] and the bias by `bias` [out], in the layer's dtype.

        A layer without bias gets one only with `create_bias`.

        Raises:
            ModelError: the values overflow the layer's dtype.
        """
        dtype = self.weight.dtype
        # Copies, since the caller may go on changing its tensors.
        stored, bias = self.as_matrix(matrix).to(dtype).clone(memory_format=torch.contiguous_format), bias.to(dtype).clone()
        if not (torch.isfinite(stored).all() and torch.isfinite(bias).all()):
            raise ModelError(f"the new weights do not fit into {dtype}: use bfloat16 or float32, or a larger ridge")
        self._replace("weight", stored)
        if create_bias or self.bias is not None:
            self._replace("bias", bias)

    def add_bias(self) -> None:
        """Give the layer an uninitialised bias: its values are about to be loaded."""
        self._replace("bias", self.weight.new_empty(self.size("out")))

    def _replace(self, name: str, value: Tensor) -> None:
        """New parameters, since the old ones may be shared with another module; as trainable as what they replace."""
        replaced = getattr(self.module, name)
        trainable = self.weight.requires_grad if replaced is None else replaced.requires_grad
        set_parameters(self.module, {name: nn.Parameter(value, requires_grad=trainable)})


def _class_name(module: nn.Module) -> str:
    """The name of a module's class; where a known class has the same name, with its module."""
    kind = type(module)
    is_namesake = kind.__name__ in {each.__name__ for each in STORAGE} and kind not in STORAGE
    return f"{kind.__module__}.{kind.__name__}" if is_namesake else kind.__name__


def is_plain(parameter: Any) -> bool:
    """Whether a parameter holds floating-point numbers, as they are.

    Quantised layers are subclasses of nn.Linear as often as not, and quantised tensors say they are of a float type: their
    values are not what their shape says.
    """
    return type(parameter) is nn.Parameter and type(parameter.data) is Tensor and parameter.is_floating_point()


def _is_ordinary(weight: Any) -> bool:
    """Whether a weight is a matrix of plain numbers of at least 16 bits."""
    return is_plain(weight) and weight.layout is torch.strided and weight.ndim == 2 and weight.itemsize >= 2


def storage_of(module: nn.Module) -> Storage | None:
    """How a module stores its weight; None where it is no layer of a known class."""
    return next((storage for kind, storage in STORAGE.items() if isinstance(module, kind)), None)


def linear_layers(block: nn.Module) -> dict[str, LayerView]:
    """The linear layers of a block by name, whether they belong to a site or not.

    Raises:
        ModelError: one of them cannot be rewritten.
    """
    return {name: LayerView.of(module, name) for name, module in block.named_modules() if storage_of(module)}
