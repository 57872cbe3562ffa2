"""Entries of config.json that tell the sizes of a pruned model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from liar.models import Layout, family_of, layout_of
from liar.surgery import Width, build_stock, scaled_sizes, uniform_sizes


def config_sizes(model: PreTrainedModel, layout: Layout) -> dict[str, Any]:
    """Entries of config.json that tell the sizes of a model: of all layers at once, or layer by layer."""
    uniform = uniform_sizes(model)
    if uniform is not None:
        return dict(uniform)
    stock = build_stock(model, {})
    assert stock is not None, "a model is built from its configuration"
    widths = {site.name: Width.of(site) for site in layout.sites}
    stacks = family_of(model).stacks
    layers: dict[str, dict[str, int]] = {}
    for site in layout_of(stock).sites:
        sizes = scaled_sizes(model, stacks[site.stack].of_kind(site.kind).config_keys, widths[site.name], Width.of(site))
        # Layers of a decoder are counted from 0 again. Where its sizes have names of their own (BART), both are told; else (T5)
        # those of the encoder, and the shapes of the tensors tell the others.
        number = site.layer - layout.blocks.index(layout.stacks[site.stack][0])
        layer = layers.setdefault(str(number), {})
        layer.update({key: size for key, size in sizes.items() if key not in layer})
    return {"per_layer_config": _readable(model, layers)}


def _readable(model: PreTrainedModel, layers: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """The sizes by layer without the one that the class of the configuration reads for all layers at once (LLaMA: the heads).

    With it, no class that reads the configuration works: not the tokenizer, not `AutoConfig`.
    """
    entries = model.config.to_dict()
    for left_out in (None, *sorted({key for sizes in layers.values() for key in sizes})):
        kept = {layer: {key: size for key, size in sizes.items() if key != left_out} for layer, sizes in layers.items()}
        try:
            type(model.config).from_dict({**entries, "per_layer_config": kept})
        except Exception:  # noqa: BLE001 (every class refuses a configuration in its own way)
            continue
        return kept
    return {layer: dict(sizes) for layer, sizes in layers.items()}
