"""Cutting layers for good: smaller parameters, and right sizes on the modules and in the configuration."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from liar.errors import ModelError
from liar.mask import Mask
from liar.models import (
    Site,
    forget_unused,
    layer_of,
    layout_of,
    plain_block,
    set_parameters,
    shared_by_copies,
    transformer_in,
)
from liar.runtime import exclusive
from liar.surgery.heads import adopt_selection, select_heads
from liar.surgery.stock import uniform_sizes


def cut_site(block: nn.Module, site: Site, unit_mask: Tensor) -> None:
    """Cut everything in a block that belongs to the units of a site to the kept ones.

    That is its producers and its consumer, further parameters, and the sizes that its modules remember; what comes from
    outside of the block is cut when it arrives.
    """
    for edge in site.edges:
        layer_of(block, edge).select(edge.axis, edge.channels(unit_mask))
    for path in site.unit_parameters:
        owner, _, name = path.rpartition(".")
        parameter = block.get_parameter(path)
        by_unit = parameter.detach().reshape(site.units, -1, *parameter.shape[1:])
        rows = by_unit.index_select(0, unit_mask.nonzero().squeeze(1).to(parameter.device)).flatten(0, 1)
        setattr(block.get_submodule(owner), name, nn.Parameter(rows, requires_grad=parameter.requires_grad))
    if site.head_argument is not None:
        attention = block.get_submodule(site.head_argument.module)
        select_heads(attention, site.head_argument, unit_mask.repeat_interleave(site.query_heads))
    for path in site.size_attributes:
        owner, _, name = path.rpartition(".")
        module = block.get_submodule(owner)
        setattr(module, name, getattr(module, name) * int(unit_mask.sum()) // site.units)


def copy_block(block: nn.Module) -> nn.Module:
    """A copy with modules of its own but the same parameters and buffers: cutting the copy leaves the original alone."""
    configs = [module.config for module in block.modules() if hasattr(module, "config")]
    return copy.deepcopy(block, {id(shared): shared for shared in (*block.parameters(), *block.buffers(), *configs)})


def copy_dense(model: nn.Module) -> nn.Module:
    """A copy of a model with its own modules and configuration but the same parameters and buffers.

    It stays as it is when the model is cut, since cutting replaces parameters and changes none in place.
    """
    return copy.deepcopy(model, {id(shared): shared for shared in shared_by_copies(model)})


def check_adoptable(block: nn.Module, pruned_block: nn.Module) -> None:
    """Check that a block can take over its cut copy: the same modules, and every parameter (a bias may have been added).

    Raises:
        ModelError: it cannot.
    """
    modules = [[(name, type(module)) for name, module in each.named_modules()] for each in (block, pruned_block)]
    lost = dict(block.named_parameters()).keys() - dict(pruned_block.named_parameters()).keys()
    if modules[0] != modules[1] or lost:
        changed = sorted(lost) or sorted(str(name) for name, _ in set(modules[0]) ^ set(modules[1]))
        raise ModelError(
            f"expected the repaired block to have the modules and parameters of the original, got others: "
            f"{', '.join(changed)}; a repair step may only write new values into the layers of a site"
        )


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Put every parameter, size and entry of the configuration back if the block ends with an error or is interrupted."""
    hooks = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks")
    inner = ("_parameters", "_buffers", *hooks)
    modules = [(module, dict(vars(module)), {name: dict(vars(module)[name]) for name in inner}) for module in model.modules()]
    config = dict(vars(model.config))
    try:
        yield
    except BaseException:
        for module, attributes, contents in modules:
            vars(module).clear()
            vars(module).update(attributes)
            for name, content in contents.items():
                vars(module)[name].clear()
                vars(module)[name].update(content)
        vars(model.config).clear()
        vars(model.config).update(config)
        raise


def adopt(block: nn.Module, pruned_block: nn.Module) -> None:
    """Give the layers of a block the parameters and sizes of its cut copy; modules and their hooks stay."""
    for module, cut_module in zip(block.modules(), pruned_block.modules(), strict=True):
        set_parameters(module, dict(cut_module.named_parameters(recurse=False)))
        for name, value in vars(cut_module).items():
            if type(value) is int and vars(module).get(name) != value:
                setattr(module, name, value)
        adopt_selection(module, cut_module)


def remove(model: nn.Module, mask: Mask | Mapping[str, Any]) -> None:
    """Cut a model to the kept units and repair nothing: the baseline of every reconstruction.

    Args:
        model: a Hugging Face model of a known family, or a model of sentence-transformers; changed in place.
        mask: a `Mask`, or one made elsewhere (see `Mask.of`).

    Raises:
        MaskError, ModelError: the message says what was expected and given, and what to do; the model is then as it was.

    Example:
        >>> liar.remove(model, mask)
        >>> liar.discover(model)["heads.0"].units == mask.kept("heads.0")
        True
    """
    model = transformer_in(model)
    with exclusive(model):
        layout = layout_of(model)
        mask = Mask.of(mask, layout)
        layout = layout.matching(mask.masks)
        with all_or_nothing(model):
            for name in layout.blocks:
                block = model.get_submodule(name)
                cut = copy_block(plain_block(block))
                for site in layout.of_block(name):
                    cut_site(cut, site, mask[site.name])
                adopt(block, cut)
            update_config(model)
            forget_unused(model)


def update_config(model: nn.Module) -> None:
    """Correct the configuration where it can express the pruned model's widths."""
    for key, value in (uniform_sizes(model) or {}).items():
        setattr(model.config, key, value)
