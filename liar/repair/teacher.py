"""What a teacher has to have in common with the model that is fitted to it."""

from __future__ import annotations

from typing import Any

from torch import nn

from liar.errors import ModelError
from liar.models import Layout, compute_device, model_type_of


def check_teacher(teacher: nn.Module, dense: Layout, model: nn.Module, pruned: Layout) -> None:
    """Check that a model can be fitted to a teacher: another object with its vocabulary, residual stream and blocks.

    Args:
        teacher: the dense model.
        dense: its sites.
        model: the model that is fitted; heads and neurons may differ.
        pruned: its sites.

    Raises:
        ModelError: it cannot.
    """
    if teacher is model:
        raise ModelError("teacher: expected another model, got the model itself; pass the dense one, or a copy made before")
    types = [model_type_of(each) for each in (teacher, model)]
    if types[0] != types[1]:
        raise ModelError(
            f"the teacher is of the type {types[0]!r}, the model of {types[1]!r}: pass the dense model that it was cut from"
        )
    _check_blocks(dense, pruned)
    vocabularies = [_vocabulary(each) for each in (teacher, model)]
    if None not in vocabularies and vocabularies[0] != vocabularies[1]:
        raise ModelError(
            f"the teacher has a vocabulary of {vocabularies[0]:,} tokens, the model of {vocabularies[1]:,}: expected the "
            "same tokenizer; pass the model that this one was cut from"
        )
    devices = [compute_device(each) for each in (teacher, model)]
    if devices[0] != devices[1]:
        raise ModelError(f"the teacher is on {devices[0]}, the model on {devices[1]}: move them to one device")


def _check_blocks(dense: Layout, pruned: Layout) -> None:
    """Check that two layouts have equally many blocks, with sites of the same names, and residual streams of one width.

    Raises:
        ModelError: they do not.
    """
    shapes = [([site.name for site in layout.sites], [site.out for site in layout.sites]) for layout in (dense, pruned)]
    if len(dense.blocks) != len(pruned.blocks) or shapes[0] != shapes[1]:
        widths = [sorted({site.out for site in layout.sites}) for layout in (dense, pruned)]
        raise ModelError(
            f"the teacher has {len(dense.blocks)} blocks and a residual stream of width {widths[0]}, the model "
            f"{len(pruned.blocks)} and {widths[1]}: expected the same; only heads and neurons may differ"
        )


def _vocabulary(model: nn.Module) -> int | None:
    """How many tokens a model knows, where it reads tokens."""
    config: Any = getattr(model, "config", None)
    size = getattr(config, "vocab_size", None)
    return size if isinstance(size, int) else None
