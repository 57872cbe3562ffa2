"""`prune`: `select` and `reconstruct` in one, in one step or in several."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import Any

from torch import nn

from liar.api.reconstruct import RECONSTRUCT_STAGES, repair
from liar.api.select import check_budget, choose, stages_of_selection
from liar.data import Calibration
from liar.errors import OptionError
from liar.mask import Mask, compose
from liar.models import Layout, count_parameters, layout_with_weights, transformer_in
from liar.options import PruneOptions, ReconstructOptions, RunOptions, SelectOptions
from liar.planning import choose_activations
from liar.progress import Progress, ProgressOption, progress_of
from liar.repair import RepairData, repair_data
from liar.report import CostChange, Report
from liar.runtime import Workspace, distributed, exclusive, layout_when_free, open_workspace, run_identity
from liar.selection import Costs, flops_of, source_of
from liar.surgery import all_or_nothing, copy_dense

# What is left of a budget that can be computed after every step.
STEPPED: Mapping[str, Callable[[nn.Module, Layout], float]] = {
    "params": lambda _, layout: float(layout.parameters),
    "flops": lambda model, layout: flops_of(model, layout).dense,
}


def prune(
    model: nn.Module,
    calib: Iterable[Any],
    *,
    keep: float,
    steps: int = PruneOptions.steps,
    criterion: str = SelectOptions.criterion,
    budget: str | Costs = SelectOptions.budget,
    widths: str = SelectOptions.widths,
    round_to: int = SelectOptions.round_to,
    protect: Sequence[str | int] = SelectOptions.protect,
    seed: int = SelectOptions.seed,
    heads: str = SelectOptions.heads,
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
    """`select` and `reconstruct` in one call: the model becomes smaller, in place. The options are those of both, and `steps`.

    `steps` is how often to prune and repair: with 2 and `keep=0.25` first to a half, then to a quarter. Units are measured anew
    on the repaired model, which is always fitted to the dense one. More than 1 needs a budget in `"params"` or `"flops"`, and
    a target on the pruned stream: any but `"layer_output"`.

    With `set_aside`, the selection does not see the sequences either.

    `activations` says where the activations of all calibration tokens are kept meanwhile: `"device"`, where they are computed;
    `"host"`, in pinned memory of the host; `"disk"`, in files, so that memory does not grow with the number of tokens;
    `"auto"`, the first of these that fits in the memory that is free.

    `run_folder` is a folder in which finished work is kept. If the process is killed, the same call with the same folder goes
    on after the last block that was finished; on a CPU the weights are those of a run that was not killed, bit for bit. The
    folder belongs to this model, these data and these options; with others it is refused. It is not deleted: new weights of a
    model on a CPU are mapped from its files, so that the model is never in memory twice.

    Example:
        >>> report = liar.prune(model, calib, keep=0.5)
        >>> report.achieved <= 0.5
        True
    """
    selection = SelectOptions(keep, criterion, budget, widths, round_to, protect, seed, heads)
    how = ReconstructOptions(target, ridge, refit, solver, bias, quality, set_aside)
    where = RunOptions(activations, run_folder)
    _, report = prune_with(model, calib, selection, how, PruneOptions(steps), where, held_out=held_out, progress=progress)
    return report


@distributed.together()
def prune_with(
    model: nn.Module,
    calib: Iterable[Any] | Calibration,
    selection: SelectOptions,
    how: ReconstructOptions,
    stepping: PruneOptions,
    where: RunOptions,
    *,
    held_out: Iterable[Any] | None = None,
    progress: ProgressOption = True,
) -> tuple[Mask, Report]:
    """`prune` with its options in objects: what stays of the model as it was, and the report."""
    selection, how, stepping, where = selection.checked(), how.checked(), stepping.checked(), where.checked()
    steps = stepping.steps
    check_budget(selection)
    _check_steps(steps, selection, how)
    dense = layout_when_free(transformer_in(model))
    data = repair_data(model, calib, how, held_out=held_out)
    model = transformer_in(model)
    stages = {**stages_of_selection(selection), **RECONSTRUCT_STAGES}
    identity = partial(run_identity, model, data.calibration, selection, how, stepping, score=source_of(selection.criterion))
    place = partial(choose_activations, model, data.calibration, how, selection=selection)
    with (
        exclusive(model),
        open_workspace(where, "prune", identity, place) as workspace,
        progress_of(progress, "prune", stages, rounds=steps) as shown,
        all_or_nothing(model),
        distributed.together(),
    ):
        if steps == 1:
            mask, cost = choose(model, data.calibration, selection, shown, workspace)
            report = repair(model, mask, data, how, shown, workspace)
        else:
            mask, cost, report = _prune_in_steps(model, dense, data, selection, how, steps, shown, workspace)
    budget = selection.budget if isinstance(selection.budget, str) else cost.name
    chosen = {"criterion": selection.criterion, "budget": budget, "widths": selection.widths}
    stepped = {"steps": steps} if steps > 1 else {}
    return mask, replace(report, options={**chosen, **stepped, **report.options}, cost=cost)


def _check_steps(steps: int, selection: SelectOptions, how: ReconstructOptions) -> None:
    """Check that a model can be pruned in so many steps."""
    if steps == 1:
        return
    if not isinstance(selection.budget, str) or selection.budget not in STEPPED:
        raise OptionError(
            f"steps={steps} needs a budget that is computed anew after every step: budget='params' or 'flops', by its name"
        )
    if not how.on_stream:
        raise OptionError(f"steps={steps} fits to the dense model: it needs target='damped_stream', not {how.target!r}")


def _prune_in_steps(
    model: nn.Module,
    dense: Layout,
    data: RepairData,
    selection: SelectOptions,
    how: ReconstructOptions,
    steps: int,
    progress: Progress,
    workspace: Workspace,
) -> tuple[Mask, CostChange, Report]:
    """Select and reconstruct, again and again, to shares that fall by one ratio; the dense model stays the target."""
    teacher, before, uncompared = copy_dense(model), count_parameters([model]), RepairData(data.calibration)
    cost_of = STEPPED[str(selection.budget)]
    whole = cost_of(model, dense)
    mask, cost, report = None, None, None
    seconds: defaultdict[str, float] = defaultdict(float)
    for number in range(1, steps + 1):
        share = min(1.0, selection.keep ** (number / steps) * whole / cost_of(model, layout_with_weights(model)))
        own = workspace.within(f"step-{number}")
        chosen, cost = choose(model, data.calibration, replace(selection, keep=share), progress, own)
        report = repair(model, chosen, uncompared, how, progress, own, teacher=None if number == 1 else teacher)
        mask = chosen if mask is None else compose(mask, chosen)
        for name, value in report.seconds.items():
            # What the progress counts is counted over all steps.
            seconds[name] = value if name in progress.seconds else seconds[name] + value
    assert mask is not None
    assert cost is not None
    assert report is not None
    requested = selection.keep if selection.budget == "params" else None
    blocks = [model.get_submodule(name) for name in dense.blocks]
    return (
        replace(mask, requested=requested),
        replace(cost, before=whole),
        replace(
            report,
            sites=tuple(replace(site, total=len(mask[site.site])) for site in report.sites),
            requested=requested,
            achieved=layout_with_weights(model).parameters / dense.parameters,
            parameters=(before, count_parameters([model])),
            seconds=dict(seconds),
            # Only the blocks have changed, so the copy with the blocks of the model is the model.
            quality=data.compare(teacher, dense, mask, blocks),
        ),
    )
