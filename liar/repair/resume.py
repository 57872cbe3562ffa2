"""What is kept of a finished block, so that a run that was killed goes on after it, and how it goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from liar.repair.state import DENSE, BlockPair, Walk
from liar.repair.step import RepairStep
from liar.runtime import run_block
from liar.surgery import cut_site

WEIGHTS = "weights/"


def finished_block(walk: Walk, block: BlockPair, original: nn.Module, steps: Sequence[RepairStep]) -> dict[str, Any]:
    """The content of the entry of a block: its new weights, and what the steps have to know.

    Args:
        walk: of the model.
        block: which is done.
        original: the block that was cut; what its copy still shares with it is not kept.
        steps: that were run.
    """
    sites = [site.name for site in block.sites]
    content: dict[str, Any] = {"drifted": walk.drifted}
    for number, step in enumerate(steps):
        content |= {f"step {number}/{name}": value for name, value in step.finished(sites).items()}
    if block.pruned is not None:
        shared = {id(parameter) for parameter in original.parameters()}
        own = block.pruned.named_parameters(remove_duplicate=False)
        content |= {WEIGHTS + name: parameter for name, parameter in own if id(parameter) not in shared}
    return content


def resume_block(walk: Walk, block: BlockPair, steps: Sequence[RepairStep], content: Mapping[str, Any]) -> None:
    """Bring a copy of a block, the steps and the dense stream to where they were when the block was finished."""
    for site in block.sites if block.pruned is not None else ():
        assert walk.mask is not None
        assert block.pruned is not None
        cut_site(block.pruned, site, walk.mask[site.name])
    if block.pruned is not None:
        set_weights(block.pruned, content)
    walk.drifted = content["drifted"]
    for number, step in enumerate(steps):
        prefix = f"step {number}/"
        own = {name.removeprefix(prefix): value for name, value in content.items() if name.startswith(prefix)}
        step.restore([site.name for site in block.sites], own)
    if block.number < len(walk.layout.blocks) - 1:
        for batch in walk.batches:
            with walk.timed("dense forward"):
                walk.store.put(DENSE, batch, run_block(block.dense, *walk.arguments(DENSE, block.number, batch)))


def set_weights(block: nn.Module, content: Mapping[str, Any]) -> None:
    """Give a block the weights of its entry, on the device of its own."""
    device = next(block.parameters()).device
    for name, value in content.items():
        if name.startswith(WEIGHTS):
            owner, _, own = name.removeprefix(WEIGHTS).rpartition(".")
            _set_parameter(block.get_submodule(owner), own, value.to(device))


def _set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """As `LayerView` does it: as trainable as what is replaced, or as the weight beside it."""
    replaced: Any = getattr(module, name)
    trainable = module.weight.requires_grad if replaced is None else replaced.requires_grad
    with torch.inference_mode(False):
        setattr(module, name, nn.Parameter(value, requires_grad=trainable))  # type: ignore[arg-type]
