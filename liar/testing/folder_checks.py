"""Checks of what becomes of a cut model: saved and loaded, by the stock class too where it can, and used to generate text."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from liar.data import Calibration
from liar.errors import LiarError
from liar.io import load, save
from liar.mask import Mask
from liar.models import Layout
from liar.surgery import remove, stock_counts
from liar.testing.compare import close, last_hidden
from liar.testing.state import expect

# Tokens that are generated.
NEW = 6


def folder(model: Any, mask: Mask, batch: Mapping[str, Tensor]) -> None:
    """A cut model is saved as a folder that gives the same model again, in 32 and in 16 bits."""
    if model.config.model_type not in CONFIG_MAPPING:
        return  # a class of one's own, that nothing but its own module finds
    attention = model.config._attn_implementation
    for dtype in (torch.float32, torch.bfloat16):
        slim = copy.deepcopy(model)
        for parameter in slim.parameters():  # buffers, such as frequencies of positions, stay in float32
            parameter.data = parameter.data.to(dtype)
        remove(slim, mask)
        with TemporaryDirectory() as place:
            try:
                save(slim, Path(place) / "slim", mask=mask)
                again = load(Path(place) / "slim", attn_implementation=attention)
            except LiarError as error:
                raise AssertionError(f"the cut model cannot be saved and loaded: {error}") from error
        expect(type(again) is type(model), f"a {type(model).__name__} was saved, a {type(again).__name__} was loaded")
        _same_output(again, slim, batch, "the loaded model differs from the saved one")


def stock_folder(model: Any, layout: Layout, batch: Mapping[str, Tensor]) -> None:
    """What the stock class can build, with equal layers, it loads."""
    counts = {kind: [count for count in legal if count < _units(layout, kind)] for kind, legal in stock_counts(model).items()}
    if not any(counts.values()):
        return
    masks = {}
    for site in layout.sites:
        fewer = counts[site.kind][-1] if counts[site.kind] else site.units
        # Others in every layer.
        masks[site.name] = (torch.arange(site.units) + site.layer) % site.units < fewer
    slim, attention = copy.deepcopy(model), model.config._attn_implementation
    remove(slim, Mask(masks))
    with TemporaryDirectory() as place:
        save(slim, Path(place) / "slim")
        again: nn.Module = type(model).from_pretrained(Path(place) / "slim", attn_implementation=attention).train(False)
    _same_output(again, slim, batch, "the stock class loads another model than was saved; check config_keys")


def generation(model: Any, mask: Mask, batch: Mapping[str, Tensor]) -> None:
    """A cut model that generates text gives the same with its cache of keys and values as without, for padded prompts, too."""
    if not model.can_generate():
        return
    slim = copy.deepcopy(model)
    remove(slim, mask)
    # Prompts are padded on the left.
    prompts = {name: value if value.is_floating_point() else value.flip(1) for name, value in batch.items()}
    try:
        first, second = (_generated(slim, prompts, use_cache=use_cache) for use_cache in (True, False))
    except (RuntimeError, TypeError, ValueError) as error:
        raise AssertionError(f"the cut model does not generate: {error}") from error
    close(first, second, torch.ones(len(first), dtype=torch.bool), "generation with a cache differs from generation without")


def _generated(model: Any, prompts: Mapping[str, Tensor], *, use_cache: bool) -> Tensor:
    """Logits of the tokens that are generated: [sequences, tokens, vocabulary]."""
    output = model.generate(
        **prompts,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        use_cache=use_cache,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack(output.logits, 1)


def _units(layout: Layout, kind: str) -> int:
    return layout.of_kind(kind)[0].units


def _same_output(one: nn.Module, other: nn.Module, batch: Mapping[str, Tensor], what: str) -> None:
    batch = _as(batch, other)
    token_mask = Calibration.of([batch], other).token_masks[0]
    first, second = (last_hidden(each, batch)[token_mask] for each in (one, other))
    expect(torch.equal(first, second), what)


def _as(batch: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The batch in the model's float type."""
    dtype = next(model.parameters()).dtype
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
