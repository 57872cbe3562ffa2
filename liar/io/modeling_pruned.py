"""Transformers whose layers were cut to different widths, as classes that Hugging Face's auto classes load.

No forward is copied. A class of this file builds the class of transformers with the same name, and then makes its layers
smaller. `config.json` holds the sizes in `"pruned"`, and names the classes in `"auto_map"`. The file needs torch and
transformers only; it is copied into every folder that uses it.
"""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

# Attributes with the sizes of the weight, and of the bias.
SIZES = {nn.Linear: ("out_features", "in_features", "out_features"), Conv1D: ("nx", "nf", "nf")}


def cut(model: nn.Module, sizes: dict[str, int], biases: list[str]) -> None:
    """Give a bare model its sizes: numbers by path of an attribute, and names of layers that have got a bias."""
    layers: dict[str, Any] = {}
    for path, size in sizes.items():
        name, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(name), attribute, size)
        layers[name] = model.get_submodule(name)
    for name, layer in layers.items():
        attributes = next((SIZES[kind] for kind in SIZES if isinstance(layer, kind)), None)
        if attributes is not None:
            rows, columns, channels = (getattr(layer, attribute) for attribute in attributes)
            layer.weight = nn.Parameter(layer.weight.detach()[:rows, :columns].clone())
            if layer.bias is not None:
                layer.bias = nn.Parameter(layer.bias.detach()[:channels].clone())
            elif name in biases:
                layer.bias = nn.Parameter(layer.weight.new_zeros(channels))


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
