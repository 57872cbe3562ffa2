"""Entries of config.json that tell the sizes of a pruned model."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
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
    patterns = family_of(model).stacks[0]
    layers: dict[str, dict[str, int]] = {}
    for site in layout_of(stock).sites:
        sizes = scaled_sizes(model, patterns.of_kind(site.kind).config_keys, widths[site.name], Width.of(site))
        # Transformers counts layers of the encoder, and reads sizes of a decoder for all layers at once, if they have names of
        # their own (BART). So entry i is for both layers i, and the smaller one is told, at which the stock class stops: what
        # each of them has, the shapes of the tensors tell.
        first = layout.blocks.index(layout.stacks[site.stack][0])
        layer = layers.setdefault(str(min(site.layer - first, len(layout.stacks[0]) - 1)), {})
        layer.update({key: min(size, layer.get(key, size)) for key, size in sizes.items()})
    return {"per_layer_config": _readable(model, layers)}


def _readable(model: PreTrainedModel, layers: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """The sizes by layer without those that transformers reads for all layers at once (LLaMA: heads).

    With them, nothing that reads the configuration works: not the tokenizer, not `AutoConfig`.
    """
    entries, keys = model.config.to_dict(), sorted({key for sizes in layers.values() for key in sizes})
    for count in range(len(keys)):
        for left_out in combinations(keys, count):
            kept = {
                number: {key: size for key, size in sizes.items() if key not in left_out} for number, sizes in layers.items()
            }
            try:
                type(model.config).from_dict({**entries, "per_layer_config": kept})
            except Exception:  # noqa: BLE001 (every class refuses a configuration in its own way)
                continue
            return kept
    return {layer: dict(sizes) for layer, sizes in layers.items()}
