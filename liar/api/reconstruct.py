"""`reconstruct`: remove what a mask does not keep, repair the rest, and compare the result with the dense model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import nn

from liar.data import Calibration
from liar.errors import MaskError, OptionError
from liar.mask import Mask, keep_all
from liar.models import Layout, count_parameters, layout_with_weights, transformer_in
from liar.options import ReconstructOptions, RunOptions
from liar.planning import choose_activations
from liar.progress import Progress, ProgressOption, progress_of, timed
from liar.repair import (
    RepairContext,
    RepairData,
    adopt_blocks,
    check_teacher,
    closed_form_steps,
    repair_data,
    walk_blocks,
)
from liar.report import Report
from liar.runtime import Workspace, distributed, exclusive, layout_when_free, open_workspace, run_identity
from liar.surgery import all_or_nothing

# The stage of a reconstruction, and about how many forward passes of the dense model it takes; see `Progress`.
RECONSTRUCT_STAGES = {"reconstruct": 2.4}


def reconstruct(
    model: nn.Module,
    mask: Mask | Mapping[str, Any] | None,
    calib: Iterable[Any],
    *,
    teacher: nn.Module | None = None,
    target: str = ReconstructOptions.target,
    ridge: float | str = ReconstructOptions.ridge,
    refit: bool = ReconstructOptions.refit,
    solver: str = ReconstructOptions.solver,
    bias: str = ReconstructOptions.bias,
    quality: int | str = ReconstructOptions.quality,
    set_aside: bool = ReconstructOptions.set_aside,
    held_out: Iterable[Any] | None = None,
    activations: str = RunOptions.activations,
    run_folder: str | PathLike[str] | None = RunOptions.run_folder,
    progress: ProgressOption = True,
) -> Report:
    """Remove the units that a mask does not keep and repair the rest by least squares, in place.

    Args:
        model: a Hugging Face model of a known family, or a model of sentence-transformers; changed in place at the very end,
            or not at all on an error.
        mask: a `Mask`, or one made elsewhere (see `Mask.of`); None cuts nothing, and needs a teacher.
        calib: calibration batches (see `Calibration.of`); for a model of sentence-transformers also strings, or pairs of them.
        teacher: the dense model that the repair is fitted to, where it is not `model` itself: so a model that another tool has
            cut, whose removed weights are gone, is repaired. Heads and neurons may differ from those of `model`; blocks,
            residual stream and vocabulary may not. It needs a target on the pruned stream, and is not changed.
        target: what the kept channels are fitted to. On the pruned model's activations, layer after layer:
            `"damped_stream"`: what the layer gives with all its units, and a part of what the stream has lost before it, the
            less the weaker the directions of the kept channels are that say something about it (docs/theory.md);
            `"residual_stream"`: all of both, that is the dense model's residual stream after the layer minus the pruned
            model's stream before it (K-prune's target). On the dense model's activations: `"layer_output"`, the consumer's own
            output (our reading of LIAR).
        ridge: pull toward the kept weights, relative to the mean diagonal of the Gram matrix; 0 is none. `"auto"` chooses
            it per site on held-out sequences, and keeps the weights as they are where no update is better.
        refit: unless the target is `"layer_output"`, first fit the layers that feed the kept units (query, key and value; the
            first feed-forward projections) to what they give in the dense model, since their input has drifted.
        solver: `"auto"`, `"cholesky"`, `"eigh"` or `"lstsq"`.
        bias: `"preserve"`: a bias is refitted where the consumer has one. `"create"`: consumers without get one, as the
            report says; the stock classes may then be unable to load the model.
        quality: on how many sequences the output of the finished model is compared with the dense model's, and that of the
            mask alone beside it: `report.quality`. `"auto"`: a 32nd of the calibration sequences, at most 16 (of little data an
            eighth, up to 4); 0: no comparison. The weights do not depend on it. Where nothing else is said, these are
            calibration sequences, which the fit has seen: `report.quality.held_out` is then False.
        set_aside: take these sequences out of the calibration data first, a quarter of it at most. The fit has less text.
        held_out: further batches, as `calib`, to compare on; sequences that repeat one of `calib` are left out.
        activations: as for `prune`.
        run_folder: as for `prune`.
        progress: show a bar, or a function that is called in its place (see `ProgressUpdate`).

    Returns:
        A `Report`: what was kept, errors before and after, a verdict for every site, and what comes out at the end. A
        comparison that finds the repair no better than the mask alone is logged as a warning, too.

    Raises:
        OptionError, MaskError, CalibrationError, ModelError: the message says what was expected and given, and what to do; the
            model is then as it was.

    Example:
        >>> report = liar.reconstruct(model, mask, calib)
        >>> report.sites[0].verdict.value
        'ridged'
    """
    options = ReconstructOptions(target, ridge, refit, solver, bias, quality, set_aside)
    where = RunOptions(activations, run_folder)
    return reconstruct_with(model, mask, calib, options, where, teacher=teacher, held_out=held_out, progress=progress)


@distributed.together()
def reconstruct_with(
    model: nn.Module,
    mask: Mask | Mapping[str, Any] | None,
    calib: Iterable[Any] | Calibration,
    options: ReconstructOptions,
    where: RunOptions,
    *,
    teacher: nn.Module | None = None,
    held_out: Iterable[Any] | None = None,
    progress: ProgressOption = True,
) -> Report:
    """`reconstruct` with its options in objects."""
    options, where = options.checked(), where.checked()
    inner = transformer_in(model)
    layout = layout_when_free(inner)
    if teacher is not None:
        teacher = _checked_teacher(transformer_in(teacher), inner, layout, options)
    elif mask is None:
        raise MaskError(
            "mask=None cuts nothing, so there is nothing to repair: pass a mask, or the dense model that this one was cut from "
            "as teacher="
        )
    chosen = keep_all(layout) if mask is None else Mask.of(mask, layout)
    data = repair_data(model, calib, options, held_out=held_out)
    with ExitStack() as stack:
        for each in (teacher, inner):
            if each is not None:
                stack.enter_context(exclusive(each))
        identity = partial(run_identity, inner, data.calibration, options, teacher=teacher, mask=chosen.to_json())
        place = partial(choose_activations, inner, data.calibration, options, masks=chosen.masks)
        workspace = stack.enter_context(open_workspace(where, "reconstruct", identity, place))
        shown = stack.enter_context(progress_of(progress, "reconstruct", RECONSTRUCT_STAGES))
        return repair(inner, chosen, data, options, shown, workspace, teacher=teacher)


def _checked_teacher(teacher: nn.Module, model: nn.Module, layout: Layout, options: ReconstructOptions) -> nn.Module:
    """A teacher that fits the model and the options."""
    if not options.on_stream:
        raise OptionError(
            f"target={options.target!r} fits a layer to its own output in the model that is cut, so it takes no teacher: use "
            "target='damped_stream'"
        )
    check_teacher(teacher, layout_when_free(teacher), model, layout)
    return teacher


def repair(
    model: nn.Module,
    mask: Mask,
    data: RepairData,
    options: ReconstructOptions,
    progress: Progress,
    workspace: Workspace,
    *,
    teacher: nn.Module | None = None,
) -> Report:
    """`reconstruct` on a model that is locked, with everything checked."""
    calibration = data.calibration
    layout = layout_with_weights(model)
    dense = layout if teacher is None else layout_with_weights(teacher)
    before = count_parameters([model])
    distributed.check_same("mask and options", (mask.to_json(), asdict(options)))
    clock: defaultdict[str, float] = defaultdict(float)
    # The stage ends when the model has changed, and a function of the caller's may raise there.
    # All processes adopt their blocks, or none does.
    with all_or_nothing(model), distributed.together(), progress.stage("reconstruct", len(layout.sites)) as advance:
        context = RepairContext(options, lambda: advance(1))
        steps, on_stream = closed_form_steps(context), options.on_stream
        blocks = walk_blocks(
            model,
            layout,
            calibration,
            steps,
            mask=mask,
            teacher=teacher,
            has_pruned_stream=on_stream,
            workspace=workspace.within("repair"),
            clock=clock,
        )
        with timed(clock, "quality"):
            quality = data.compare(model, layout, mask, blocks, teacher=teacher)
        adopt_blocks(model, layout, blocks)
    return Report(
        sites=tuple(context.reports),
        requested=mask.requested,
        achieved=mask.parameters(layout) / dense.parameters,
        parameters=(before, count_parameters([model])),
        tokens=calibration.tokens,
        sequences=calibration.sequences,
        options=asdict(options),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        seconds={**progress.seconds, **clock},
        quality=quality,
        distinct_tokens=calibration.distinct_tokens,
        lengths=_lengths(calibration),
    )


def _lengths(calibration: Calibration) -> tuple[int, int, int]:
    """Tokens of the shortest, the median and the longest sequence."""
    lengths = torch.cat([mask.sum(1).cpu() for mask in calibration.token_masks])
    return int(lengths.min()), int(lengths.median()), int(lengths.max())
