"""One walk over the blocks of a model, with the dense stream and the pruned stream side by side.

Reconstruction, error curves, the benchmark's baselines and training are steps that plug into this walk. Memory beside the
model and its pruned copy: the two streams, and what the steps keep of one block.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from liar.data import Calibration
from liar.mask import Mask
from liar.models import Layout, base_and_prefix, compute_device, layout_of, plain_block, put_away
from liar.repair.captures import Capture, capture_points, read_captures
from liar.repair.resume import finished_block, resume_block, set_weights
from liar.repair.state import DENSE, PRUNED, BlockPair, SiteState, Walk
from liar.repair.step import RepairStep
from liar.repair.teacher import check_teacher
from liar.runtime import (
    IN_PLACE,
    Point,
    Workspace,
    calls_of,
    capture_activations,
    distributed,
    preserve_model_state,
    record_block_calls,
    run_block,
)
from liar.surgery import copy_block, cut_site


def walk_blocks(
    model: nn.Module,
    layout: Layout,
    calibration: Calibration,
    steps: Sequence[RepairStep],
    *,
    mask: Mask | None = None,
    teacher: nn.Module | None = None,
    has_pruned_stream: bool = True,
    workspace: Workspace = IN_PLACE,
    clock: defaultdict[str, float] | None = None,
) -> list[nn.Module]:
    """Walk the blocks once, and let the steps look at every site and repair it.

    In each block the dense copy runs first, and steps `observe` its activations. Then site after site is cut and repaired, so
    that each step sees the pruned stream as the sites before it left it.

    Where several processes share the run (see `liar.runtime.distributed`), the steps of each see its share of the batches: what
    they make of all tokens has to be summed over the processes first.

    Args:
        model: the model to cut; it is left alone.
        layout: its sites.
        calibration: batches for it.
        steps: what is done at every site, in order.
        mask: the units that stay; None to walk the dense model only.
        teacher: the model whose stream is the dense one, if it is another: with as many blocks, and a residual stream of the
            same width. Heads and neurons may differ.
        has_pruned_stream: False saves the pruned stream where no step runs the pruned block.
        workspace: where activations are kept, and finished blocks; blocks that an earlier run has finished are read.
        clock: seconds by stage are added here.

    Returns:
        The pruned and repaired copy of every block, in order; empty without a mask.

    Raises:
        ModelError: the teacher does not fit the model (see `check_teacher`).
        CalibrationError: the model does not take a batch.
        CheckpointError: what the workspace holds is damaged, or its disk is full.

    Example:
        >>> from liar.repair import RepairStep, walk_blocks
        >>> layout, batches = liar.discover(model), liar.Calibration.of(calib, model)
        >>> pruned = walk_blocks(model, layout, batches, [RepairStep()], mask=mask)  # only cuts
        >>> pruned[0].intermediate.dense.out_features == mask.kept("neurons.0")
        True
        >>> liar.discover(model) == layout  # the model itself is not changed
        True
    """
    has_pruned_stream = has_pruned_stream and mask is not None
    if mask is not None:
        layout = layout.matching(mask.masks)
    calibration = distributed.share(calibration, model)
    source, dense_layout = (model, layout) if teacher is None else (teacher, layout_of(teacher))
    if teacher is not None:
        check_teacher(teacher, dense_layout, model, layout)
    clock = defaultdict(float) if clock is None else clock
    walk = Walk(layout, calibration, mask, workspace.new_store(), clock, has_pruned_stream, has_teacher=teacher is not None)
    device = compute_device(model)
    with preserve_model_state(model), preserve_model_state(source):
        pruned_blocks: list[nn.Module] = []
        for number, (name, dense_name) in enumerate(zip(layout.blocks, dense_layout.blocks, strict=True)):
            stack = layout.stack_of(name)
            if name == layout.stacks[stack][0]:
                with walk.timed("enter"):
                    _enter(walk, source, dense_layout, DENSE, stack)
                    if has_pruned_stream:
                        _enter_pruned(walk, model, stack)
            own, dense = model.get_submodule(name), plain_block(source.get_submodule(dense_name), device)
            original = dense if teacher is None else plain_block(own, device)
            block = BlockPair(
                number=number,
                dense=dense,
                pruned=None if mask is None else copy_block(original),
                sites=layout.of_block(name),
                dense_sites=dense_layout.of_block(dense_name),
            )
            finished = workspace.read(_entry(number))
            if finished is None:
                _walk_block(walk, block, steps, is_pre_norm=dense_layout.is_pre_norm)
                _commit(workspace, walk, block, original, steps)
            else:
                resume_block(walk, block, steps, finished)
            _leave(walk, block)
            if block.pruned is not None:
                put_away(block.pruned, own)
                pruned_blocks.append(block.pruned)
    return pruned_blocks


def _walk_block(walk: Walk, block: BlockPair, steps: Sequence[RepairStep], *, is_pre_norm: bool) -> None:
    """Observe, cut and repair all sites of one block, and move the dense stream past it."""
    states = [SiteState(walk, block, *pair) for pair in zip(block.sites, block.dense_sites, strict=True)]
    _dense_pass(walk, block, states, steps, is_pre_norm=is_pre_norm)
    for state in states:
        _visit(state, steps)


def _entry(number: int) -> str:
    """The name of a block's entry in the journal."""
    return f"block-{number:04d}"


def _commit(workspace: Workspace, walk: Walk, block: BlockPair, original: nn.Module, steps: Sequence[RepairStep]) -> None:
    """Keep a finished block; what is on a CPU lives in its file from then on, and not in memory."""
    if workspace.journal is None:
        return
    workspace.commit(_entry(block.number), finished_block(walk, block, original, steps))
    if block.pruned is not None and next(block.pruned.parameters()).device.type == "cpu":
        set_weights(block.pruned, workspace.read(_entry(block.number)) or {})


def _leave(walk: Walk, block: BlockPair) -> None:
    """Move the pruned stream past a finished block, and forget what belongs to it."""
    if walk.has_pruned_stream and block.number < len(walk.layout.blocks) - 1:
        _advance(walk, block)
    calls = (calls_of(stream, block.number) for stream in (DENSE, PRUNED))
    walk.store.discard(*calls, *(f"{site.name} replay" for site in block.replayed))


def _enter(walk: Walk, model: nn.Module, layout: Layout, stream: str, stack: int) -> None:
    """Store what enters the first block of a stack, and how its blocks are called."""
    base, _ = base_and_prefix(model)
    encoder, blocks = (
        [model.get_submodule(name) for names in stacks for name in names]
        for stacks in (layout.stacks[:stack], layout.stacks[stack : stack + 1])
    )
    calibration = walk.calibration
    record_block_calls(base, blocks, calibration.batches, walk.store, stream, numbers=calibration.numbers, encoder=encoder)


def _enter_pruned(walk: Walk, model: nn.Module, stack: int) -> None:
    """The same for the pruned stream, which begins as the dense one where both come from one model."""
    if walk.drifted:
        _enter(walk, model, walk.layout, PRUNED, stack)
        return
    walk.store.share(DENSE, PRUNED)
    blocks = walk.layout.blocks
    for number in map(blocks.index, walk.layout.stacks[stack]):
        walk.store.share(calls_of(DENSE, number), calls_of(PRUNED, number))


def _dense_pass(
    walk: Walk, block: BlockPair, states: Sequence[SiteState], steps: Sequence[RepairStep], *, is_pre_norm: bool
) -> None:
    """Run the dense block on its stream and move that on; the steps observe every site."""
    captures = sorted({capture for step in steps for capture in step.captures})
    points: dict[str, Point] = {}
    for site in block.dense_sites:
        points |= {f"{site.name} {name}": point for name, point in capture_points(block.dense, site, captures).items()}
        if site.sublayer and walk.has_pruned_stream:
            points[f"{site.name} sublayer"] = Point(block.dense.get_submodule(site.sublayer), None)
    for batch in walk.batches:
        # A function of its own, so that nothing of this batch outlives it but what the steps keep.
        _dense_batch(walk, block, states, steps, captures, points, batch, is_pre_norm=is_pre_norm)


def _dense_batch(
    walk: Walk,
    block: BlockPair,
    states: Sequence[SiteState],
    steps: Sequence[RepairStep],
    captures: Sequence[Capture],
    points: Mapping[str, Point],
    batch: int,
    *,
    is_pre_norm: bool,
) -> None:
    with walk.timed("dense forward"), capture_activations(points) as activations:
        output = run_block(block.dense, *walk.arguments(DENSE, block.number, batch))
    walk.store.put(DENSE, batch, output)
    for state in states:
        prefix = f"{state.name} "
        own = {name.removeprefix(prefix): value for name, value in activations.items() if name.startswith(prefix)}
        if "sublayer" in own:
            returned: Any = own["sublayer"]
            block.returns[state.name] = len(returned) if isinstance(returned, tuple) else None
        with walk.timed("dense forward"):
            dense = read_captures(own, block.dense, state.dense_site, captures, state.calibration.token_masks[batch])
            if is_pre_norm and "stream" in dense and state is states[-1] and torch.equal(dense["stream"], output):
                dense["stream"] = output  # the same values: one tensor less to keep
        for step in steps:
            step.observe(state, batch, {name: dense[name] for name in step.captures})


def _visit(state: SiteState, steps: Sequence[RepairStep]) -> None:
    """Cut one site and let the steps repair it."""
    walk = state.walk
    changes = walk.drifted or any(step.changes_all for step in steps)
    if walk.mask is not None and state.keeps_all and not changes:
        for step in steps:
            step.skip(state)
        return
    for step in steps:
        step.before_cut(state)
    if walk.mask is not None:
        # Also where everything is kept: a step may change the layers, and the user's model shares them until they are cut.
        cut_site(state.pruned_block, state.site, state.unit_mask)
    for step in steps:
        step.repair(state)
    if walk.store.batches(f"{state.name} replay") == list(walk.batches):
        state.block.replayed.append(state.site)
    # Without a pruned stream nothing a site does reaches the next one.
    walk.drifted = walk.drifted or walk.has_pruned_stream


def _advance(walk: Walk, block: BlockPair) -> None:
    """Move the pruned stream past a block; as long as nothing was cut it is the dense one."""
    assert block.pruned is not None
    for batch in walk.batches:
        with walk.timed("pruned forward"), walk.replays(block, batch):
            if walk.drifted:
                walk.store.put(PRUNED, batch, run_block(block.pruned, *walk.arguments(PRUNED, block.number, batch)))
            else:
                walk.store.put(PRUNED, batch, walk.store.get(DENSE, batch))
