"""Models that are saved together with the code that builds them, so that they load where this library is not installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from liar.errors import CheckpointError
from liar.io.sizes import config_sizes
from liar.models import Layout, base_and_prefix, layer_of, layout_of, layout_with_weights, transformer_in
from liar.surgery import build_stock, modeling_pruned, selection_of, stock_class
from liar.surgery.modeling_pruned import KEPT

# The file that is saved with a model, and the entries of config.json for it: the sizes, and what auto classes load.
CODE = Path(modeling_pruned.__file__)
ENTRIES = ("pruned", "auto_map")


@dataclass(frozen=True)
class Form:
    """How a model is saved.

    Attributes:
        kind: its class.
        entries: those of `ENTRIES` that its configuration has.
        layers: the sizes of every layer, which a standalone model keeps beside its configuration.
    """

    kind: type[nn.Module]
    entries: Mapping[str, Any]
    layers: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Form:
        """The form that a model has."""
        entries = {name: entry for name, entry in vars(model.config).items() if name in ENTRIES}
        return cls(type(model), entries, vars(model).get("per_layer_config"))

    @classmethod
    def stock(cls, model: PreTrainedModel) -> Form:
        """The form without code: that of the model, unless it is a standalone one."""
        own = cls.of(model)
        return cls(stock_class(model), {}) if "pruned" in own.entries else own

    @classmethod
    def standalone(cls, model: PreTrainedModel, layout: Layout, sizes: Mapping[str, Any]) -> Form:
        """The form with the code that builds the model; the stock form where transformers needs none.

        Raises:
            CheckpointError: no auto class loads models of this class.
        """
        layers = sizes.get("per_layer_config")
        if layers is None:
            return cls.stock(model)
        stock = cls.stock(model).kind
        loaded_by = _auto_classes(model.config, stock)
        if stock not in loaded_by.values():
            raise CheckpointError(
                f"standalone=True: expected a model that an auto class loads ({', '.join(loaded_by)}), none of them loads a "
                f"{stock.__name__}: save the bare model (model.base_model), or leave standalone out and use liar.load"
            )
        auto_map = {name: f"{CODE.stem}.{kind.__name__}" for name, kind in loaded_by.items()}
        others = {name: value for name, value in (vars(model.config).get("auto_map") or {}).items() if name not in loaded_by}
        entries = {"pruned": _pruned(model, layout), "auto_map": {**others, **auto_map}}
        return cls(getattr(modeling_pruned, stock.__name__), entries, layers)

    @property
    def loader(self) -> str:
        """The class whose `from_pretrained` loads the model: an auto class for a standalone one."""
        return modeling_pruned.auto_class(self.kind, self.entries.get("auto_map", {})) or self.kind.__name__

    def give(self, model: Any) -> None:
        """Give a model this form; its weights stay as they are."""
        for owner, names in ((model.config, ENTRIES), (model, ["per_layer_config"])):
            for name in names:
                vars(owner).pop(name, None)
        vars(model.config).update(self.entries)
        if self.layers is not None:
            model.per_layer_config = self.layers
        model.__class__ = self.kind


def make_standalone(model: nn.Module) -> None:
    """Change a pruned model so that its own `save_pretrained` also saves the code that builds it.

    From now on everything that saves the model (`save_pretrained`, `push_to_hub`, a Trainer, `SentenceTransformer`) writes a
    folder that loads without this library, by `AutoModel….from_pretrained(folder, trust_remote_code=True)`. The model's class
    becomes a subclass of what it was, with the same name; outputs do not change. A model that plain transformers can load
    stays as it is. After another cut, call it again.

    Args:
        model: of a known family, or a model of sentence-transformers with one inside; changed in place.

    Raises:
        CheckpointError: no auto class loads models of this class.
        ModelError: the model is of no known family, or quantised.

    Example:
        >>> from transformers import AutoModel
        >>> liar.remove(model, {"neurons.0": [0, 1, 2]})
        >>> liar.make_standalone(model)
        >>> model.save_pretrained("pruned")
        >>> AutoModel.from_pretrained("pruned", trust_remote_code=True).encoder.layer[0].intermediate.dense.out_features
        3
    """
    inner: Any = transformer_in(model)
    layout = layout_with_weights(inner)
    Form.standalone(inner, layout, config_sizes(inner, layout)).give(inner)


@contextmanager
def in_form(model: PreTrainedModel, form: Form) -> Iterator[None]:
    """Give a model another form for the time of the block."""
    before = Form.of(model)
    form.give(model)
    try:
        yield
    finally:
        before.give(model)


def _auto_classes(config: Any, stock: type[nn.Module]) -> dict[str, Any]:
    """The auto classes that know a configuration, by name, and what each loads; `stock` where it may load several."""
    loaded_by: dict[str, Any] = {}
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if isinstance(auto, type) and mapping is not None and type(config) in mapping:
            kinds = mapping[type(config)]
            kinds = kinds if isinstance(kinds, tuple) else (kinds,)
            loaded_by[name] = stock if stock in kinds else kinds[0]
    return {name: kind for name, kind in loaded_by.items() if getattr(transformers, kind.__name__, None) is kind}


def _pruned(model: PreTrainedModel, layout: Layout) -> dict[str, Any]:
    """What `modeling_pruned.cut` needs to cut the bare model that the stock class builds to the sizes of a model."""
    _, prefix = base_and_prefix(model)
    sizes: dict[str, int] = {}
    for site in layout.sites:
        block = model.get_submodule(site.block)
        for edge in site.edges:
            layer = layer_of(block, edge)
            sizes[f"{site.block}.{edge.module}.{layer.storage.sizes[edge.axis]}"] = layer.size(edge.axis)
    built = build_stock(model, {})
    assert built is not None, "a model is built from its configuration"
    for site in layout_of(built).sites:
        block = model.get_submodule(site.block)
        paths = site.size_attributes + (site.by_query.size_attributes if site.by_query else ())
        sizes |= {f"{site.block}.{path}": attrgetter(path)(block) for path in paths}
    consumers = {f"{site.module}.bias" for site in layout.sites}
    rows = {f"{site.block}.{path}" for site in layout.sites for path in site.unit_parameters}
    biases = consumers & dict(model.named_parameters()).keys() - dict(built.named_parameters()).keys()
    return {
        "sizes": {name.removeprefix(prefix): size for name, size in sizes.items()},
        "biases": sorted(name.removeprefix(prefix).removesuffix(".bias") for name in biases),
        "rows": {name.removeprefix(prefix): len(model.get_parameter(name)) for name in sorted(rows)},
        "heads": {name.removeprefix(prefix): entry for name, entry in _selections(model, layout)},
    }


def _selections(model: PreTrainedModel, layout: Layout) -> Iterator[tuple[str, dict[str, Any]]]:
    """By full name of an attention whose heads select entries of an argument: how many they are, and which argument."""
    for site in layout.sites:
        if site.head_argument is not None:
            name = f"{site.block}.{site.head_argument.module}"
            kept = model.get_submodule(name)._buffers.get(KEPT)
            if kept is not None:
                yield name, {"count": len(kept), "argument": asdict(selection_of(site.head_argument))}
