"""The contract of a family, checked on a tiny random model of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from liar import slim
from liar.api import reconstruct
from liar.calibration import Calibration
from liar.capture import Call, Point, block_calls, preserved, run, run_model, watching
from liar.errors import LiarError, ModelError, Verdict
from liar.families import base_and_prefix, discover, family_of
from liar.mask import Mask
from liar.rebuild import TARGETS, Job, Options, rebuild
from liar.sites import Layout, Site, linear
from liar.testing.guest import assert_same_state, expect, guest_state, same_bits
from liar.testing.tiny import tiny_batches


def check_family(model: nn.Module, batches: Sequence[Mapping[str, Tensor]] | None = None) -> Layout:
    """The contract of a family: pass a tiny random model of it, or raise an `AssertionError` that says what is wrong.

    It checks that the table names layers of consistent shapes in the order of the data; that consumer outputs are added to
    the named residual streams; that cutting equals zeroing, with the right sizes on modules and in the configuration; that
    keeping everything changes no bit; that reconstruction brings the output nearer to the dense model's on new tokens; and
    that an error in the middle leaves the model as it was.

    Args:
        model: of a registered family; not changed. Several layers, heads and random biases make the check sharp.
        batches: at least two calibration batches with some hundred tokens each; random tokens if not given.

    Returns:
        The layout that was found.

    Raises:
        AssertionError: the family's table (or the model's class) breaks the contract.
        ModelError: the table names layers that the model has not got.

    Example:
        >>> from liar.testing import tiny_model
        >>> layout = check_family(tiny_model("bert", head="question-answering"))
        >>> layout.uncovered
        ()
    """
    if batches is None:
        batches = tiny_batches(model, batches=6, sequences=16, length=16)
    expect(len(batches) >= 2, "expected at least two batches: the last one is held out")
    batches = [dict(batch) for batch in batches]
    model = copy.deepcopy(model).float().eval()
    layout = discover(model)
    mask = _some_mask(layout)
    with torch.no_grad():
        _check_shapes(model, layout)
        _check_streams(model, layout, batches)
        _check_cut(model, layout, mask, batches)
        _check_sizes(model, layout)
        _check_keep_all(model, layout, batches)
        _check_replay(model, layout, mask, batches)
        _check_repair(model, layout, mask, batches)
    _check_error(model, mask, batches)
    return layout


def _check_shapes(model: nn.Module, layout: Layout) -> None:
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


def _check_streams(model: nn.Module, layout: Layout, batches: Sequence[Mapping[str, Tensor]]) -> None:
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
                _close(value, whole[site_name], calibration.keep[0], f"{site_name}: a block run alone differs from the model")
            for site in layout.of_block(name):
                other = _swapped(block, site, hidden, call)
                _close(
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


def _check_cut(model: nn.Module, layout: Layout, mask: Mask, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Cutting units off equals zeroing the weights that read them, and leaves the right sizes behind."""
    masked, cut = copy.deepcopy(model), copy.deepcopy(model)
    for site in layout.sites:
        weight = linear(masked.get_submodule(site.block), site.consumer).weight
        weight[:, site.consumer.channels(~mask[site.name])] = 0
    _cut(cut, layout, mask)
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
    for batch in batches[:2]:
        kept_tokens = Calibration.of([batch], model).keep[0]
        try:
            output = _output(cut, batch)
        except RuntimeError as error:
            raise AssertionError(f"the cut model does not run: {error}; check producers in the family's table") from error
        _close(output, _output(masked, batch), kept_tokens, "cutting differs from zeroing the weights")


def _check_sizes(model: nn.Module, layout: Layout) -> None:
    """Every integer on a module that goes with the number of units is in the table's `counts`, so that it is corrected."""
    for pattern in family_of(model).patterns:
        config: Any = copy.deepcopy(model.config)
        sites = layout.of_kind(pattern.kind)
        units, wanted = sites[0].units, max(1, sites[0].units // 2)
        for key in pattern.sizes:
            expect(hasattr(config, key), f"{pattern.kind}: the configuration has no {key!r}; check sizes in the table")
            setattr(config, key, getattr(config, key) * wanted // units)
        try:
            with torch.device("meta"):
                stock = type(model)(config)
        except Exception:  # noqa: BLE001 (a class may refuse a configuration in its own way)
            continue
        if not pattern.sizes or wanted == units:
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


def _check_keep_all(model: nn.Module, layout: Layout, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Keeping everything changes nothing, bit for bit."""
    everything = Mask({site.name: torch.ones(site.units, dtype=torch.bool) for site in layout.sites})
    for target in TARGETS:
        same = copy.deepcopy(model)
        before = {name: value.clone() for name, value in same.state_dict().items()}
        report = reconstruct(same, everything, batches[:2], target=target, progress=False)
        for name, value in same.state_dict().items():
            expect(same_bits(value, before[name]), f"target={target!r}: keeping everything has changed {name}")
        expect(set(report.verdicts.values()) == {Verdict.UNTOUCHED}, f"target={target!r}: expected every site untouched")


def _check_repair(model: nn.Module, layout: Layout, mask: Mask, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Reconstruction on all batches but the last brings the output on the last one nearer to the dense model's."""
    *seen, new = batches
    bare, repaired = copy.deepcopy(model), copy.deepcopy(model)
    _cut(bare, layout, mask)
    report = reconstruct(repaired, mask, seen, progress=False)
    kept = {site.site: site.kept for site in report.sites}
    expect(kept == {name: mask.kept(name) for name in mask.keep}, f"the report says {kept} units were kept; the mask differs")
    keep = Calibration.of([new], model).keep[0]
    dense = _output(model, new)[keep]
    worse, better = (float((_output(m, new)[keep] - dense).square().mean()) for m in (bare, repaired))
    expect(better < worse, f"reconstruction raised the held-out error from {worse:.3g} to {better:.3g}; check residual")


def _check_replay(model: nn.Module, layout: Layout, mask: Mask, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Replaying what the mixers gave is the same as running them again."""
    again = replace(layout, sites=tuple(replace(site, mixer=None) for site in layout.sites))
    calibration, options = Calibration.of(batches[:2], model), Options("dense_stream", 0.01, True, "auto", "keep")
    with preserved(model):
        try:
            made = [rebuild(Job(mask, calibration, options, int), model, each) for each in (again, layout)]
        except (RuntimeError, TypeError, ValueError) as error:
            raise AssertionError(f"mixer: its output cannot be replayed: {error}") from error
        for other, one in zip(*made, strict=True):
            for (name, value), want in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
                close = torch.allclose(value, want, rtol=1e-4, atol=1e-5)
                expect(close, f"mixer: replaying it gives other weights in {name}; it must do nothing but feed the consumer")


def _check_error(model: nn.Module, mask: Mask, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """An error in the middle leaves hooks, modes, weights and the random state as they were."""
    model.train()
    next(model.children()).eval()
    consumer = model.get_submodule(discover(model).sites[-1].module)
    handle = consumer.register_forward_hook(_fail)
    before = guest_state(model)
    try:
        reconstruct(model, mask, batches, progress=False)
    except (_PlannedError, LiarError):
        assert_same_state(model, before)
    else:
        raise AssertionError("an error in a forward pass was swallowed")
    finally:
        handle.remove()


class _PlannedError(Exception):
    pass


def _fail(*_: Any) -> None:
    raise _PlannedError


def _some_mask(layout: Layout) -> Mask:
    """Removes a half of the units in even layers and a third in odd ones, so that layers become unequal."""
    keep = {}
    for site in layout.sites:
        keep[site.name] = (torch.arange(site.units) + site.layer) % (2 + site.layer % 2) != 0
        keep[site.name][-1] = True
    return Mask(keep)


def _cut(model: nn.Module, layout: Layout, mask: Mask) -> None:
    """Remove units for good and repair nothing."""
    for name in layout.blocks:
        block = model.get_submodule(name)
        student = slim.student(block)
        for site in layout.of_block(name):
            slim.cut_site(student, site, mask[site.name])
        slim.adopt(block, student)


def _output(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    base, _ = base_and_prefix(model)
    with torch.no_grad():
        output = base(**Calibration.of([batch], model).batches[0])[0]
    assert isinstance(output, Tensor)
    return output


def _close(got: Tensor, wanted: Tensor, keep: Tensor, what: str) -> None:
    """Compare at the kept tokens, by the scale of what is wanted."""
    got, wanted = got[keep], wanted[keep]
    scale = float(wanted.square().mean().sqrt())
    try:
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * scale)
    except AssertionError as error:
        raise AssertionError(f"{what}\n{error}") from error
