"""Checks of what the table of a family says: shapes, order, streams, and what has to be right once units are cut."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from operator import attrgetter

import torch
from torch import Tensor, nn

from liar.data import Calibration
from liar.errors import ModelError
from liar.mask import Mask
from liar.models import LayerView, Layout, Site, base_and_prefix, layer_of, layout_of
from liar.models.layers import storage_of
from liar.runtime import (
    ActivationStore,
    BlockCall,
    Point,
    added_point,
    by_sequence,
    calls_of,
    capture_activations,
    output_scale,
    preserve_model_state,
    record_block_calls,
    replay_output,
    residual_points,
    residual_sum,
    run_block,
    run_model,
)
from liar.surgery import Width, build_stock, kind_sizes, patterns_of, remove
from liar.testing.compare import close, last_hidden
from liar.testing.state import expect

# Added to a residual stream: so much that all else is small beside it.
LARGE = 1e4


def shapes(model: nn.Module, layout: Layout) -> None:
    """Channels divide into units, producers and consumers agree on their number, names lead somewhere."""
    expect(bool(layout.sites), "the table finds no site at all")
    for site in layout.sites:
        expect(
            site.query_heads == 1 or sum(edge.width for edge in site.producers) < 3 * site.consumer.width,
            f"{site.name}: {site.query_heads} query heads are said to share a key and value head, but keys and values are as "
            "wide as queries; check group_size in the family's table",
        )
        block = model.get_submodule(site.block)
        for edge in site.edges:
            size = layer_of(block, edge).size(edge.axis)
            channels = edge.by_unit(site.units).flatten()
            expect(
                len(set(channels.tolist())) == len(channels) == size,
                f"{site.name}: {edge.module} has {size} channels, which are not {site.units} units of {edge.width}; "
                "check the producers, unit_width and group_size in the family's table",
            )
        expect(site.out == layer_of(block, site.consumer).size("out"), f"{site.name}: wrong number of output channels")
    removable = sum(site.parameters * site.units for site in layout.sites)
    expect(
        removable <= layout.parameters, "the sites have more parameters than their blocks: is a layer in two sites of a block?"
    )


def streams(model: nn.Module, layout: Layout, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Blocks run one by one give what the model gives; sites come in order; residual + consumer output is the stream."""
    calibration = Calibration.of(batches[:1], model)
    base, _ = base_and_prefix(model)
    points = {site.name: Point(model.get_submodule(site.module), None) for site in layout.sites}
    with preserve_model_state(model), capture_activations(points) as in_model:
        run_model(base, calibration.batches[0])
    expected = [site.name for site in layout.sites]
    expect(list(in_model) == expected, f"the data passes the sites in the order {list(in_model)}, the table says {expected}")
    for site in layout.sites:
        shape, tokens = in_model[site.name].shape[:-1], calibration.of_stack(site.stack).token_masks[0]
        expect(
            shape in (tokens.shape, (tokens.numel(),)),
            f"{site.name}: {site.consumer.module} gives a tensor {list(in_model[site.name].shape)}, expected [sequences, "
            "length, channels], or [tokens, channels]",
        )
    store, stream, encoder = ActivationStore(), "dense", list[nn.Module]()
    with preserve_model_state(model):
        for number, names in enumerate(layout.stacks):
            blocks = [model.get_submodule(name) for name in names]
            record_block_calls(base, blocks, calibration.batches, store, stream, encoder=encoder)
            for name, block in zip(names, blocks, strict=True):
                call = store.get(calls_of(stream, layout.blocks.index(name)), 0)
                tokens = calibration.of_stack(number).token_masks[0]
                after = _block_stream(block, layout, name, store.get(stream, 0), call, in_model, tokens)
                store.put(stream, 0, after)
            encoder += blocks


def _block_stream(
    block: nn.Module,
    layout: Layout,
    name: str,
    hidden: Tensor,
    call: BlockCall,
    in_model: Mapping[str, Tensor],
    tokens: Tensor,
) -> Tensor:
    """One block, run alone: its sites give what they give in the model, and are added to the stream; what comes out of it."""
    sites = layout.of_block(name)
    points = {site.name: Point(block.get_submodule(site.consumer.module), None) for site in sites}
    with capture_activations(points) as activations:
        after = run_block(block, hidden, call)
    for site_name, value in activations.items():
        close(
            by_sequence(value, tokens),
            by_sequence(in_model[site_name], tokens),
            tokens,
            f"{site_name}: a block run alone differs from the model",
        )
    for site in sites:
        beside = [other for other in sites if site.added in other.added_before]
        close(
            _shifted(block, site, beside, hidden, call),
            after,
            tokens,
            f"{site.name}: what comes out of the block is not a function of residual + consumer output; check "
            f"residual={site.residual}, is_parallel, output_scale and output_norm in the family's table",
        )
    for site in sites:
        _norm(block, layout, site, hidden, call, tokens)
    return after


def _norm(block: nn.Module, layout: Layout, site: Site, hidden: Tensor, call: BlockCall, token_mask: Tensor) -> None:
    """What is added to the stream of a pre-norm block comes out of it as it is; a post-norm block normalises it."""
    outputs, scale = [], output_scale(block, site)
    for added in (0.0, LARGE):
        handle = block.get_submodule(site.added).register_forward_hook(
            lambda _module, _args, output, added=added: output + added / scale
        )
        try:
            outputs.append(run_block(block, hidden, call)[token_mask].double())
        finally:
            handle.remove()
    passed_on = float((outputs[1] - outputs[0]).median()) / LARGE
    expect(
        (passed_on > 0.5) == layout.is_pre_norm,
        f"{site.name}: of what is added to the residual stream {abs(passed_on):.0%} comes out of the block, the family's "
        f"table says is_pre_norm={layout.is_pre_norm}",
    )


def _shifted(block: nn.Module, site: Site, beside: Sequence[Site], hidden: Tensor, call: BlockCall) -> Tensor:
    """The block's output if it reads other hidden states, and what the site adds makes up for that in the residual sum.

    Sites `beside` it, which read the same hidden states in a parallel block, add what they added before.
    """
    points = residual_points(block, site)
    other = hidden + torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden)
    unchanged = {each.name: added_point(block, each) for each in beside}
    with capture_activations(points | {"out": added_point(block, site)} | unchanged) as activations:
        run_block(block, hidden, call)
    with capture_activations(points) as moved:
        run_block(block, other, call)
    residual, out = residual_sum(activations, site), activations["out"]
    expect(
        residual.shape == out.shape,
        f"{site.name}: the residual has another shape than the consumer's output; check residual={site.residual}",
    )
    replacement = out + (residual - residual_sum(moved, site)) / output_scale(block, site)
    outputs = {site.added: replacement} | {each.added: activations[each.name] for each in beside}
    with ExitStack() as hooks:
        for name, output in outputs.items():
            hooks.enter_context(replay_output(block.get_submodule(name), output))
        return run_block(block, other, call)


def cut(model: nn.Module, layout: Layout, mask: Mask, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Cutting units off equals zeroing the weights that read them, and leaves the right sizes behind."""
    cut, layout = copy.deepcopy(model), layout.matching(mask.masks)
    try:
        remove(cut, mask)
        actual = layout_of(cut)
    except ModelError as error:
        raise AssertionError(
            f"the cut model is not what the table says any more; check unit_width and size_attributes: {error}"
        ) from error
    _noted_sizes(cut)
    for old, new in zip(layout.sites, actual.sites, strict=True):
        _cut_site(model, cut, old, new, mask.kept(old.name))
    left = mask.parameters(layout)
    expect(actual.parameters == left, f"expected {left} parameters in the cut blocks, found {actual.parameters}")
    _as_zeroed(model, cut, layout, mask, batches[:2])


def _noted_sizes(cut: nn.Module) -> None:
    """The sizes that layers note are those of their weights."""
    for name, module in cut.named_modules():
        if storage := storage_of(module):
            layer = LayerView.of(module, name)
            sizes = {axis: (layer.size(axis), getattr(module, attribute)) for axis, attribute in storage.sizes.items()}
            expect(
                all(size == noted for size, noted in sizes.values()),
                f"{name}: the noted sizes are not those of its weight: {sizes}",
            )


def _cut_site(model: nn.Module, cut: nn.Module, old: Site, new: Site, kept: int) -> None:
    """A site of the cut model has the kept units, and everything that goes with them."""
    by_query = bool(old.groups)
    units = new.units * new.query_heads if by_query else new.units
    expect(units == kept, f"{old.name}: {kept} units were kept, the cut model has {units}; check unit_width")
    same = new.units == old.groups if by_query else new.query_heads == old.query_heads
    expect(same, f"{old.name}: {old.query_heads} query heads per unit became another number; check group_size")
    for path in old.size_attributes:
        before, after = (attrgetter(path)(m.get_submodule(old.block)) for m in (model, cut))
        expect(before * kept == after * old.units, f"{old.name}: {path} went from {before} to {after}, not with the units")


def _as_zeroed(model: nn.Module, cut: nn.Module, layout: Layout, mask: Mask, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """A cut model computes what the whole one does if the weights that read removed units are zero."""
    zeroed = copy.deepcopy(model)
    for site in layout.sites:
        layer = layer_of(zeroed.get_submodule(site.block), site.consumer)
        layer.matrix[site.consumer.channels(~mask[site.name])] = 0
    for batch in batches:
        token_mask = Calibration.of([batch], model).token_masks[0]
        try:
            output = last_hidden(cut, batch)
        except (RuntimeError, TypeError, ValueError) as error:
            raise AssertionError(
                f"the cut model does not run: {error}; check producers, size_attributes, unit_parameters and head_argument in "
                "the family's table"
            ) from error
        close(output, last_hidden(zeroed, batch), token_mask, "cutting differs from zeroing the weights")


def sizes(model: nn.Module, layout: Layout) -> None:
    """Every integer on a module that goes with the number of units is in `size_attributes`, so that it is corrected."""
    for number, pattern in patterns_of(model):
        kind, first = pattern.kind, layout.stacks[number][0]
        for key in pattern.config_keys:
            expect(hasattr(model.config, key), f"{kind}: the configuration has no {key!r}; check config_keys in the table")
        now = Width.of(next(site for site in layout.of_block(first) if site.kind == kind))
        fewer = replace(now, units=max(1, now.units // 2))
        stock = build_stock(model, kind_sizes(model, layout, kind, fewer))
        # A class may refuse a configuration, in its own way.
        if stock is None or not pattern.config_keys or fewer == now:
            continue
        built = next(site for site in layout_of(stock).of_block(first) if site.kind == kind)
        expect(
            built.units == fewer.units,
            f"{kind}: config_keys={pattern.config_keys} should make {fewer.units} units of {now.units}, made {built.units}",
        )
        _attributes(model, stock, layout.of_block(first), kind, fewer.units / now.units)


def _attributes(model: nn.Module, stock: nn.Module, sites: Sequence[Site], kind: str, share: float) -> None:
    """Integers of a block that are smaller by a share in a smaller stock model are in `size_attributes`."""
    listed = {path for site in sites for path in site.size_attributes}
    dense, small = (m.get_submodule(sites[0].block) for m in (model, stock))
    edges = [edge.module for site in sites for edge in site.edges]
    for name, module in dense.named_modules():
        if not any(edge == name or edge.startswith(f"{name}.") for edge in edges):
            continue  # nothing of this module is cut (cross-attention, say), so its sizes stay
        for key, value in vars(module).items():
            path, other = f"{name}.{key}".lstrip("."), vars(small.get_submodule(name)).get(key)
            moves = type(value) is int and type(other) is int and other != value and other == value * share
            expect(
                not moves or storage_of(module) is not None or path in listed,
                f"{kind}: {path} goes with the number of units; name it in size_attributes in the family's table",
            )
