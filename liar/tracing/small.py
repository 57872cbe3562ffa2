"""A small random model of the same class: everything is tried on it, nothing on the user's model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from liar.data.batches import read_batches
from liar.errors import ModelError
from liar.models import base_and_prefix, linear_layers
from liar.runtime import ActivationStore, BlockCall, calls_of, record_block_calls
from liar.surgery import build_stock
from liar.testing import randomise, tiny_batches
from liar.tracing.findings import NotFoundError

LAYERS = 2
VOCABULARY = 512
# Copies of one sequence that run side by side, and its tokens: so many channels are tried in one run of a block.
PROBES = 48
LENGTH = 4


@dataclass(frozen=True)
class Probe:
    """The first block of a small model, and how the model calls it for `PROBES` copies of one sequence."""

    block: nn.Module
    hidden: Tensor
    call: BlockCall


def small_model(model: nn.Module, blocks: str) -> nn.Module:
    """A random model of the class with fewer layers and words, and shared key and value heads, where its class can.

    What the class cannot build from its configuration is a copy of the model with random weights.
    """
    shorter, fewer_words = _fewer_layers(model, blocks), _fewer_words(model)
    for entries in ({**shorter, **fewer_words}, shorter, fewer_words, {}):
        if _classes(build_stock(model, entries), blocks) == _classes(model, blocks):
            built = random_model(model, {**entries, **_shared_heads(model, entries, blocks)})
            if built is not None:
                return built
    built = copy.deepcopy(model).float().cpu().eval()
    randomise(built)
    return built


def random_model(model: nn.Module, entries: Mapping[str, Any]) -> nn.Module | None:
    """A model of the same class with other entries of the configuration and random weights; None if the class refuses."""
    built = build_stock(model, entries, device="cpu")
    if built is not None:
        randomise(built)
        built = built.float().eval()
    return built


def probe_of(small: nn.Module, blocks: str) -> Probe:
    """Run a small model up to its first block.

    Raises:
        NotFoundError: it does not run on random tokens.
    """
    base, _ = base_and_prefix(small)
    store, modules = ActivationStore(), _blocks(small, blocks)
    try:
        (batch,) = tiny_batches(small, batches=1, sequences=1, length=LENGTH, padding=None)
        copies = {name: value.expand(PROBES, -1) for name, value in batch.items()}
        with torch.no_grad():
            record_block_calls(base, modules, [read_batches([copies], small)[0][0]], store, "probes")
    except (AttributeError, ModelError, ValueError) as error:
        raise NotFoundError(
            "batch", f"a small {type(small).__name__} does not run block by block on random input_ids: {error}"
        ) from error
    return Probe(modules[0], store.get("probes", 0), store.get(calls_of("probes", 0), 0))


def own_entries(config: Any) -> dict[str, Any]:
    """The entries of a configuration that are its class's own."""
    common = PreTrainedConfig().to_dict()
    return {name: value for name, value in config.to_dict().items() if name not in common and hasattr(config, name)}


def _blocks(model: nn.Module | None, blocks: str) -> list[nn.Module]:
    """The blocks of a model; none where it has no such list."""
    try:
        modules = base_and_prefix(model)[0].get_submodule(blocks) if model is not None else None
    except AttributeError:
        return []
    return list(modules) if isinstance(modules, nn.ModuleList) else []


def _classes(model: nn.Module | None, blocks: str) -> list[tuple[str, type]]:
    """The modules of the first block."""
    return [(name, type(module)) for block in _blocks(model, blocks)[:1] for name, module in block.named_modules()]


def _fewer_layers(model: nn.Module, blocks: str) -> dict[str, Any]:
    """Entries with which the class builds `LAYERS` blocks: their number, with all lists of one entry for each block."""
    layers, entries = len(_blocks(model, blocks)), own_entries(model.config)
    lists = {key: value[:LAYERS] for key, value in entries.items() if isinstance(value, list) and len(value) == layers}
    numbers = [name for name, value in entries.items() if value == layers > LAYERS]
    shorter = ({**lists, name: LAYERS} for name in numbers)
    return next((each for each in shorter if len(_blocks(build_stock(model, each), blocks)) == LAYERS), {})


def _fewer_words(model: nn.Module) -> dict[str, int]:
    words = getattr(model.config, "vocab_size", None)
    return {"vocab_size": VOCABULARY, "pad_token_id": 0} if isinstance(words, int) and words > VOCABULARY else {}


def _shared_heads(model: nn.Module, entries: Mapping[str, Any], blocks: str) -> dict[str, int]:
    """An entry with which several query heads share a key and value head, and there are several of these.

    A table has to say how heads are shared even if this model does not share them: others of its family may. With such an entry
    some layers have fewer outputs (or more, if there was one key and value head), but no layer has fewer inputs.
    """
    before = _layer_sizes(build_stock(model, entries), blocks)
    for name, old in own_entries(model.config).items():
        if type(old) is not int or not (old == 1 or (old >= 4 and old % 2 == 0)):
            continue
        new = 2 if old == 1 else old // 2
        sizes = _layer_sizes(build_stock(model, {**entries, name: new}), blocks)
        changed = [key for key in before if sizes and sizes[key] != before[key]]
        if changed and all(sizes[key] == (before[key][0], before[key][1] * new // old) for key in changed):
            return {name: new}
    return {}


def _layer_sizes(model: nn.Module | None, blocks: str) -> dict[str, tuple[int, int]]:
    """Input and output channels of every linear layer of the first block."""
    layers = linear_layers(block) if (block := next(iter(_blocks(model, blocks)), None)) else {}
    return {name: (layer.size("in"), layer.size("out")) for name, layer in layers.items()}
