"""Transformers whose layers were cut to different widths, as classes that Hugging Face's auto classes load.

No forward is copied. A class of this file builds the class of transformers with the same name, and then makes its layers
smaller. `config.json` holds the sizes in `"pruned"`, and names the classes in `"auto_map"`. The file needs torch and
transformers only; it is copied into every folder that uses it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

# Attributes with the sizes of the weight, and of the bias.
SIZES = {nn.Linear: ("out_features", "in_features", "out_features"), Conv1D: ("nx", "nf", "nf")}


# A buffer of an attention that was cut, saved with its weights: int64 [kept heads], their numbers in the model as it was.
KEPT = "kept_heads"


@dataclass
class HeadSelection:
    """An argument of an attention with fewer heads, that comes with entries for all heads: as hooks that select the kept ones.

    Attributes:
        name: of the argument.
        position: its index among the positional arguments, where it is passed as one of them.
        dim: the dimension of its heads.
        with_sequences: whether that dimension counts sequences, too, and for each of them its heads.
        returned: the index of the argument among the values that the attention returns, with entries for all heads.
        maker: a module inside the attention that makes it where none comes in, with the heads last.
    """

    name: str
    position: int
    dim: int
    with_sequences: bool = False
    returned: int | None = None
    maker: str | None = None

    def __post_init__(self) -> None:
        """What belongs to a call: the argument with entries for all heads, and the numbers of the kept ones."""
        self.full: Tensor | None = None
        self.kept = torch.zeros(0, dtype=torch.int64)

    def attach(self, attention: nn.Module, kept: Tensor) -> None:
        """Let an attention read the entries of the kept heads, int64 [kept heads]."""
        attention.register_buffer(KEPT, kept)
        attention.register_forward_pre_hook(self.before, with_kwargs=True)
        if self.returned is not None:
            attention.register_forward_hook(self.after)
        if self.maker is not None and hasattr(attention, self.maker):
            attention.get_submodule(self.maker).register_forward_hook(self.made)

    def before(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments of a call with the entries of the kept heads."""
        self.full, self.kept = None, attention.get_buffer(KEPT)
        sequences = len(args[0])
        if self.name in kwargs:
            return args, {**kwargs, self.name: self.select(kwargs[self.name], sequences)}
        place = slice(self.position, self.position + 1)
        chosen = (self.select(value, sequences) for value in args[place])
        return (*args[: place.start], *chosen, *args[place.stop :]), kwargs

    def select(self, value: Tensor | None, sequences: int) -> Tensor | None:
        """The entries of the kept heads."""
        self.full = value
        if value is None or not self.with_sequences:
            return value if value is None else value.index_select(self.dim, self.kept)
        by_head = value.reshape(*value.shape[: self.dim], sequences, -1, *value.shape[self.dim + 1 :])
        return by_head.index_select(self.dim + 1, self.kept).flatten(self.dim, self.dim + 1)

    def made(self, _maker: nn.Module, _args: Any, output: Tensor) -> Tensor:
        """What the maker gives for the kept heads."""
        self.full = output.movedim(-1, 0)[(None,) * self.dim]
        return output.index_select(-1, self.kept)

    def after(self, _attention: nn.Module, _args: Any, output: Any) -> Any:
        """What the attention returns, with the entries of all heads, for the blocks after it."""
        full, self.full = self.full, None
        return output if full is None else (*output[: self.returned], full, *output[self.returned + 1 :])  # type: ignore[operator]

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to a call."""
        return {**vars(self), "full": None}


def cut(
    model: nn.Module,
    sizes: dict[str, int],
    biases: list[str],
    rows: dict[str, int] | None = None,
    heads: dict[str, dict[str, Any]] | None = None,
) -> None:
    """Give a bare model its sizes.

    Args:
        model: as its class builds it.
        sizes: numbers by path of an attribute.
        biases: names of layers that have got a bias.
        rows: of further parameters, by name.
        heads: by name of an attention, how many heads it has kept, and the `HeadSelection` of its argument.
    """
    layers: dict[str, Any] = {}
    for path, size in sizes.items():
        name, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(name), attribute, size)
        layers[name] = model.get_submodule(name)
    for name, layer in layers.items():
        attributes = next((SIZES[kind] for kind in SIZES if isinstance(layer, kind)), None)
        if attributes is not None:
            first, second, channels = (getattr(layer, attribute) for attribute in attributes)
            layer.weight = nn.Parameter(layer.weight.detach()[:first, :second].clone())
            if layer.bias is not None:
                layer.bias = nn.Parameter(layer.bias.detach()[:channels].clone())
            elif name in biases:
                layer.bias = nn.Parameter(layer.weight.new_zeros(channels))
    for path, count in (rows or {}).items():
        name, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(name), attribute, nn.Parameter(model.get_parameter(path).detach()[:count].clone()))
    for name, selection in (heads or {}).items():
        attention = model.get_submodule(name)
        kept = next(attention.parameters()).new_zeros(selection["count"], dtype=torch.int64)
        HeadSelection(**selection["argument"]).attach(attention, kept)


def take_layers(config: Any) -> Any:
    """Take the sizes of every layer out of a configuration: classes of transformers have one size, and stop at several."""
    layers = config.to_dict().get("per_layer_config")
    config.per_layer_config = None
    vars(config).pop("per_layer_config", None)  # an entry like any other, where transformers does not know it
    return layers


def auto_class(kind: type, auto_map: dict[str, str]) -> str | None:
    """The auto class that loads a class of this file."""
    return next((name for name, reference in auto_map.items() if reference.endswith(f".{kind.__name__}")), None)


class Pruned:
    """Added to a class of transformers: its models are cut when they are built, and saved with their sizes and this file."""

    config: Any
    base_model: Any
    _auto_class: str | None
    builds_pruned = True

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        layers = take_layers(config)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        self.per_layer_config = layers
        cut(self.base_model, **config.pruned)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As every model does it, with the sizes of every layer in the configuration.

        Raises:
            ValueError: layers were cut since the sizes were written down.
        """
        for path, size in self.config.pruned["sizes"].items():
            name, _, attribute = path.rpartition(".")
            if getattr(self.base_model.get_submodule(name), attribute) != size:
                raise ValueError(
                    f"{path} is no longer {size}, as config.pruned says: the model was cut again. Save it with "
                    "liar.save(model, folder, standalone=True), or call liar.make_standalone(model) first"
                )
        # With an auto class, transformers copies this file.
        type(self)._auto_class = auto_class(type(self), self.config.auto_map)
        self.config.per_layer_config = self.per_layer_config
        try:
            # Under the names that the tensors have here; some models had others once, which only classes of transformers know.
            super().save_pretrained(*args, **{"save_original_format": False, **kwargs})  # type: ignore[misc]
        finally:
            take_layers(self.config)


def __getattr__(name: str) -> type[PreTrainedModel]:
    """The class for pruned models of a class of transformers with this name (PEP 562)."""
    stock = getattr(transformers, name, None)
    if not isinstance(stock, type) or not issubclass(stock, PreTrainedModel):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}, and transformers has no model of this name")
    kind = type(name, (Pruned, stock), {"__module__": __name__, "__doc__": stock.__doc__})
    globals()[name] = kind
    return kind
