"""Low-rank updates of some layers of a block, through peft; merged into the weights in the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from liar.errors import OptionError


def check_lora(rank: int | None) -> None:
    """Raise an `OptionError` where low-rank updates are asked for and peft is not installed."""
    if rank is not None and find_spec("peft") is None:
        raise OptionError(f'lora={rank} needs peft, which is not installed: pip install "liar-prune[lora]"')


@contextmanager
def low_rank(blocks: Mapping[nn.Module, Sequence[str]], rank: int, seed: int) -> Iterator[list[nn.Parameter]]:
    """Let layers compute with W + B A, A [rank, in] random and B [out, rank] zero; merged and plain layers again at the end.

    Args:
        blocks: names of layers by the module that holds them.
        rank: of the updates.
        seed: of the matrices A.

    Yields:
        The matrices A and B of all layers: what is to be trained.
    """
    from peft import LoraConfig, inject_adapter_in_model  # noqa: PLC0415 (an extra)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for block, names in blocks.items():
            # Without dropout, and with a scale of 1.
            inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(names)), block)
    wrapped: list[tuple[nn.Module, str, Any]] = [
        (block, name, block.get_submodule(name)) for block, names in blocks.items() for name in names
    ]
    try:
        yield [each for *_, layer in wrapped for name, each in layer.named_parameters() if "lora_" in name]
        for *_, layer in wrapped:
            layer.merge()
    finally:
        for block, name, layer in wrapped:
            block.set_submodule(name, layer.get_base_layer())
        for block in blocks:
            block.requires_grad_(False)
