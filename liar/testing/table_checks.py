"""Checks of what the table of a family says: shapes, order, streams, and what has to be right once units are cut."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from operator import attrgetter

import torch
from torch import Tensor, nn

from liar import slim
from liar.batches import Calibration
from liar.capture import Call, Point, block_calls, preserved, run, run_model, watching
from liar.errors import ModelError
from liar.families import base_and_prefix, discover, family_of
from liar.mask import Mask
from liar.sites import Layout, Site, linear
from liar.testing.compare import close, last_hidden, without
from liar.testing.guest import expect


def shapes(model: nn.Module, layout: Layout) -> None:
    """Channels divide into units, producers and consumers agree on their number, names lead somewhere."""
    expect(bool(layout.sites), "the table finds no site at all")
    for site in layout.sites:
        block = model.get_submodule(site.block)
        for edge in (*site.producers, site.consumer):
            rows, columns = linear(block, edge).weight.shape
            size = rows if edge.axis == "out" else columns
            expect(
                size == edge.width * site.units,
                f"{site.name}: {edge.module} has {size} channels, which are not {site.units} units of {edge.width}; "
                "check the producers and unit_width in the family's table",
            )
        expect(site.out == linear(block, site.consumer).weight.shape[0], f"{site.name}: wrong number of output channels")
    removable = sum(site.parameters * site.units for site in layout.sites)
    expect(
        removable <= layout.parameters, "the sites have more parameters than their blocks: is a layer in two sites of a block?"
    )


def streams(model: nn.Module, layout: Layout, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Blocks run one by one give what the whole model gives; sites come in order; residual + consumer output is the stream."""
    calibration = Calibration.of(batches[:1], model)
    base, _ = base_and_prefix(model)
    blocks = [model.get_submodule(name) for name in layout.blocks]
    points = {site.name: Point(linear(model.get_submodule(site.block), site.consumer), None) for site in layout.sites}
    with preserved(model), watching(points) as whole:
        run_model(base, calibration.batches[0])
    expected = [site.name for site in layout.sites]
    expect(list(whole) == expected, f"the data passes the sites in the order {list(whole)}, the table says {expected}")
    with preserved(model):
        (hidden,), calls = block_calls(base, blocks, calibration.batches)
        for name, block, (call,) in zip(layout.blocks, blocks, calls, strict=True):
            with watching({site.name: points[site.name] for site in layout.of_block(name)}) as seen:
                after = run(block, hidden, call)
            for site_name, value in seen.items():
                close(value, whole[site_name], calibration.keep[0], f"{site_name}: a block run alone differs from the model")
            for site in layout.of_block(name):
                other = _swapped(block, site, hidden, call)
                close(
                    other,
                    after,
                    calibration.keep[0],
                    f"{site.name}: what comes out of the block is not a function of residual + consumer output; "
                    f"check residual={site.residual} in the family's table",
                )
            hidden = after


def _swapped(block: nn.Module, site: Site, hidden: Tensor, call: Call) -> Tensor:
    """The block's output if it reads other hidden states, and the consumer's output makes up for that in the residual sum."""
    consumer = linear(block, site.consumer)
    residual = Point(block.get_submodule(site.residual[0]), site.residual[1])
    other = hidden + torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden)
    with watching({"residual": residual, "out": Point(consumer, None)}) as seen:
        run(block, hidden, call)
    with watching({"residual": residual}) as moved:
        run(block, other, call)
    expect(
        seen["residual"].shape == seen["out"].shape,
        f"{site.name}: the residual has another shape than the consumer's output; check residual={site.residual}",
    )
    wanted = seen["residual"] + seen["out"] - moved["residual"]
    handle = consumer.register_forward_hook(lambda *_: wanted)
    try:
        return run(block, other, call)
    finally:
        handle.remove()


def cut(model: nn.Module, layout: Layout, mask: Mask, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Cutting units off equals zeroing the weights that read them, and leaves the right sizes behind."""
    cut = copy.deepcopy(model)
    without(cut, layout, mask)
    for name, module in cut.named_modules():
        if isinstance(module, nn.Linear):
            shape = (module.out_features, module.in_features)
            expect(shape == tuple(module.weight.shape), f"{name}: the sizes {shape} are not those of its weight")
    try:
        found = discover(cut)
    except ModelError as error:
        raise AssertionError(
            f"the cut model is not what the table says any more; check unit_width and counts: {error}"
        ) from error
    for old, new in zip(layout.sites, found.sites, strict=True):
        kept = mask.kept(old.name)
        expect(new.units == kept, f"{old.name}: {kept} units were kept, the cut model has {new.units}; check unit_width")
        expect(new.query_heads == old.query_heads, f"{old.name}: {old.query_heads} query heads per unit became another number")
        for path in old.counts:
            before, after = (attrgetter(path)(m.get_submodule(old.block)) for m in (model, cut))
            expect(before * kept == after * old.units, f"{old.name}: {path} went from {before} to {after}, not with the units")
    left = mask.parameters(layout)
    expect(found.parameters == left, f"expected {left} parameters in the cut blocks, found {found.parameters}")
    _as_zeroed(model, cut, layout, mask, batches, "cutting")


def drop(model: nn.Module, layout: Layout, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Removing all units of a site equals zeroing all that its consumer reads, and leaves the other sites in place."""
    for gone in layout.sites:
        if not gone.droppable:
            continue
        mask = Mask({site.name: torch.full([site.units], site != gone) for site in layout.sites})
        without_one = copy.deepcopy(model)
        without(without_one, layout, mask)
        found = discover(without_one)
        expect(found.dropped == (gone.name,), f"{gone.name} was dropped, the model says that {found.dropped} were")
        expect(len(found.sites) == len(layout.sites) - 1, f"{gone.name} was dropped, and left {len(found.sites)} sites")
        _as_zeroed(model, without_one, layout, mask, batches[:1], f"dropping {gone.name}")
        _goes_on(without_one, batches[0]["input_ids"], gone.name)


def _goes_on(model: nn.Module, ids: Tensor, dropped: str) -> None:
    """A text that is read in two parts, the second with the cache of the first, is read as in one (where there is a cache)."""
    base, _ = base_and_prefix(model)
    half = ids.shape[1] // 2
    cache = getattr(base(input_ids=ids[:, :half]), "past_key_values", None)
    if cache is None:
        return
    try:
        rest = base(input_ids=ids[:, half:], past_key_values=cache)[0]
    except (RuntimeError, TypeError, ValueError) as error:
        raise AssertionError(f"dropping {dropped}: the model does not go on from its cache: {error}") from error
    everywhere = torch.ones(rest.shape[:2], dtype=torch.bool, device=rest.device)
    close(
        rest,
        base(input_ids=ids)[0][:, half:],
        everywhere,
        f"dropping {dropped}: a text read in two parts differs from the whole",
    )


def _as_zeroed(
    model: nn.Module, cut: nn.Module, layout: Layout, mask: Mask, batches: Sequence[Mapping[str, Tensor]], what: str
) -> None:
    """A cut model says what the whole one does if the consumers' weights of all that went are zero."""
    zeroed = copy.deepcopy(model)
    for site in layout.sites:
        weight = linear(zeroed.get_submodule(site.block), site.consumer).weight
        weight[:, site.consumer.channels(~mask[site.name])] = 0
    for batch in batches[:2]:
        kept_tokens = Calibration.of([batch], model).keep[0]
        try:
            output = last_hidden(cut, batch)
        except (RuntimeError, TypeError, ValueError) as error:
            raise AssertionError(
                f"{what}: the cut model does not run: {error}; check producers and mixer in the family's table"
            ) from error
        close(output, last_hidden(zeroed, batch), kept_tokens, f"{what} differs from zeroing the weights")


def sizes(model: nn.Module, layout: Layout) -> None:
    """Every integer on a module that goes with the number of units is in the table's `counts`, so that it is corrected."""
    for pattern in family_of(model).patterns:
        sites = layout.of_kind(pattern.kind)
        units, wanted = sites[0].units, max(1, sites[0].units // 2)
        for key in pattern.sizes:
            expect(hasattr(model.config, key), f"{pattern.kind}: the configuration has no {key!r}; check sizes in the table")
        stock = slim.skeleton(model, slim.scaled_sizes(model, pattern, wanted, units))
        # A class may refuse a configuration, in its own way.
        if stock is None or not pattern.sizes or wanted == units:
            continue
        got = discover(stock).of_kind(pattern.kind)[0].units
        expect(got == wanted, f"{pattern.kind}: sizes={pattern.sizes} should make {wanted} units of {units}, made {got}")
        known = {path for site in layout.of_block(layout.blocks[0]) for path in site.counts}
        dense, small = (m.get_submodule(layout.blocks[0]) for m in (model, stock))
        for name, module in dense.named_modules():
            for key, value in vars(module).items():
                path, other = f"{name}.{key}".lstrip("."), vars(small.get_submodule(name)).get(key)
                moves = type(value) is int and other != value and other is not None and other * units == value * wanted
                expect(
                    not moves or isinstance(module, nn.Linear) or path in known,
                    f"{pattern.kind}: {path} goes with the number of units; name it in counts in the family's table",
                )
