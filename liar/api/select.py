"""`select`: which heads and neurons stay."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, replace
from functools import partial
from os import PathLike
from typing import Any

from torch import Tensor, nn

from liar.data import Calibration, transformer_and_data
from liar.errors import CalibrationError, OptionError, at_site
from liar.mask import Mask
from liar.models import Layout, layout_with_weights, plain_block
from liar.options import ReconstructOptions, RunOptions, SelectOptions
from liar.planning import choose_activations
from liar.progress import Progress, ProgressOption, progress_of
from liar.report import CostChange
from liar.runtime import Workspace, distributed, exclusive, layout_when_free, open_workspace, run_identity
from liar.selection import (
    CRITERIA,
    TOLERANCE,
    Budget,
    Costs,
    CriterionStatistics,
    SiteWeights,
    allocate,
    best_of_groups,
    by_rank,
    collect_with,
    flops_of,
    latency,
    params_of,
    rank_scores,
    scores,
    source_of,
    stages_of,
)
from liar.statistics import check_finite
from liar.surgery import stock_counts

logger = logging.getLogger(__name__)

COSTS: Mapping[str, Callable[[nn.Module, Layout, Progress], Costs]] = {
    "params": lambda _model, layout, _: params_of(layout),
    "flops": lambda model, layout, _: flops_of(model, layout),
    "latency": lambda model, _, progress: latency(model, progress=progress),
}


def select(
    model: nn.Module,
    calib: Iterable[Any] | CriterionStatistics | None = None,
    *,
    keep: float,
    criterion: str = SelectOptions.criterion,
    budget: str | Costs = SelectOptions.budget,
    widths: str = SelectOptions.widths,
    round_to: int = SelectOptions.round_to,
    protect: Sequence[str | int] = SelectOptions.protect,
    seed: int = SelectOptions.seed,
    heads: str = SelectOptions.heads,
    activations: str = RunOptions.activations,
    run_folder: str | PathLike[str] | None = RunOptions.run_folder,
    progress: ProgressOption = True,
) -> Mask:
    """Decide which heads and neurons stay.

    Args:
        model: a Hugging Face model of a known family, or a model of sentence-transformers; it is not changed.
        calib: calibration batches (see `Calibration.of`), or the result of `collect`; may be left out for criteria that
            need weights only. For a model of sentence-transformers also strings, or pairs of strings.
        keep: share of the budget that stays, in (0, 1]. The costs of the mask never exceed it, and meet it within 1 % where
            widths are free. (A share of measured time is met as far as the measured times add up.)
        criterion: `"reconstruction"`: change of the output when the unit is removed and the rest reconstructed;
            `"fluctuation"`, `"wanda"`, `"magnitude"`, `"random"`; from gradients of the loss, of the batches' `labels` if they
            have any: `"taylor"`, `"fisher"`, `"snip"`.
        budget: what `keep` is a share of: `"params"`, parameters in the transformer blocks; `"flops"`, matrix products in the
            blocks for sequences of 128 tokens, or what `flops` returns for others; `"latency"`, time of the whole model for
            one sequence of 128 tokens, or what `latency` has measured for others.
        widths: `"free"`: all units compete for one budget, and layers differ in width; `"balanced"`: the same share of every
            layer, or nearly so; `"uniform"`: the same numbers in every layer, and only those with which the stock class can
            load the model.
        round_to: heads and neurons of a layer keep a multiple of so many channels (or all): hardware-friendly widths.
        protect: names of sites (`"heads.0"`) and numbers of layers that stay whole.
        seed: for `"random"`.
        heads: `"group"`: query heads that share keys and values go together with them; `"query"`: single query heads go,
            equally many of every group of a layer, and all keys and values stay: for models with few key and value heads.
        activations: as for `prune`.
        run_folder: as for `prune`; for criteria that look at activations.
        progress: show a bar, or a function that is called in its place (see `ProgressUpdate`).

    Returns:
        A `Mask`; `mask.requested` is `keep` if the budget is in parameters.

    Raises:
        OptionError, BudgetError, CalibrationError, ModelError: the message says what was expected and given, and what to do.

    Example:
        >>> mask = liar.select(model, calib, keep=0.5)
        >>> mask.parameters(liar.discover(model)) <= 0.5 * liar.discover(model).parameters
        True
    """
    options = SelectOptions(keep, criterion, budget, widths, round_to, protect, seed, heads)
    return select_with(model, calib, options, RunOptions(activations, run_folder), progress=progress)


@distributed.together()
def select_with(
    model: nn.Module,
    calib: Iterable[Any] | Calibration | CriterionStatistics | None,
    options: SelectOptions,
    where: RunOptions,
    *,
    progress: ProgressOption = True,
) -> Mask:
    """`select` with its options in objects."""
    options, where = options.checked(), where.checked()
    check_budget(options)
    model, calib = transformer_and_data(model, calib)
    # Read before the model is locked: an iterable may need another thread, or this one, to use the model.
    if CRITERIA[options.criterion].needs and calib is not None and not isinstance(calib, CriterionStatistics):
        layout_when_free(model)
        calib = Calibration.of(calib, model)
    calibration = calib if isinstance(calib, Calibration) else None
    if calibration is None:
        where = RunOptions()  # nothing takes long
    identity = partial(run_identity, model, calibration, options, score=source_of(options.criterion))
    with (
        exclusive(model),
        open_workspace(where, "select", identity, partial(_place, model, calibration, options)) as workspace,
        progress_of(progress, "select", stages_of_selection(options, collects=calibration is not None)) as shown,
    ):
        mask, _ = choose(model, calib, options, shown, workspace)
    return mask


def _place(model: nn.Module, calibration: Calibration | None, options: SelectOptions) -> str:
    """Where activations fit, if there are any."""
    if calibration is None:
        return "device"
    return choose_activations(model, calibration, ReconstructOptions(quality=0), selection=options)


def check_budget(options: SelectOptions) -> None:
    """Check that a budget is a name or `Costs`, and not what they are saved as.

    Raises:
        OptionError: it is a mapping.
    """
    if isinstance(options.budget, Mapping):
        raise OptionError("budget: expected liar.Costs, got a mapping; liar.Costs.from_json reads what they were saved as")


def stages_of_selection(options: SelectOptions, *, collects: bool = True) -> dict[str, float]:
    """The stages of a selection; see `Progress`."""
    timed = {"latency": 2.0} if options.budget == "latency" else {}
    return timed | (stages_of([options.criterion]) if collects else {})


def choose(
    model: nn.Module,
    calib: Iterable[Any] | Calibration | CriterionStatistics | None,
    options: SelectOptions,
    progress: Progress,
    workspace: Workspace,
) -> tuple[Mask, CostChange]:
    """`select` on a model that is locked, with options that are checked; also what the mask does to the costs."""
    known = workspace.read("mask")
    if known is not None:
        return Mask.from_json(known["mask"]), CostChange(*known["cost"])
    mask, cost = _choose(model, calib, options, progress, workspace)
    workspace.commit("mask", {"mask": mask.to_json(), "cost": astuple(cost)})
    return mask, cost


def _choose(
    model: nn.Module,
    calib: Iterable[Any] | Calibration | CriterionStatistics | None,
    options: SelectOptions,
    progress: Progress,
    workspace: Workspace,
) -> tuple[Mask, CostChange]:
    criterion = CRITERIA[options.criterion]
    by_group = layout_with_weights(model)
    layout = by_group.counted_by(options.heads)
    counted = by_rank(layout)
    if counted != layout and not (isinstance(options.budget, str) and options.budget in ("params", "flops")):
        raise OptionError(
            "heads='query' needs budget='params' or 'flops': other costs are known for whole groups of heads only"
        )
    # Times that are measured differ from process to process.
    costs = distributed.answer(partial(_costs, model, counted, options.budget, progress))
    possible = stock_counts(model, options.heads) if options.widths == "uniform" else None
    budget = Budget.of(counted, costs, options, possible=possible)
    statistics: Mapping[str, Mapping[str, Tensor]] = {site.name: {} for site in layout.sites}
    if criterion.needs:
        if calib is None:
            raise CalibrationError(f"criterion={options.criterion!r} needs activations: pass calibration batches")
        if isinstance(calib, CriterionStatistics):
            calib.check(model, layout, options.criterion)
            statistics = calib.sites
        else:
            calibration = Calibration.of(calib, model)
            collected = collect_with(model, calibration, [options.criterion], options.heads, progress, workspace)
            statistics = collected.sites
    return distributed.answer(partial(_mask_from, model, by_group, statistics, budget, options))


def _costs(model: nn.Module, layout: Layout, budget: str | Costs, progress: Progress) -> Costs:
    """The costs that a budget is a share of."""
    return COSTS[budget](model, layout, progress) if isinstance(budget, str) else budget


def _mask_from(
    model: nn.Module,
    by_group: Layout,
    statistics: Mapping[str, Mapping[str, Tensor]],
    budget: Budget,
    options: SelectOptions,
) -> tuple[Mask, CostChange]:
    """The mask that scores and a budget lead to, and what it does to the costs."""
    layout, costs, criterion = by_group.counted_by(options.heads), budget.costs, CRITERIA[options.criterion]
    counted = by_rank(layout)
    by_site: dict[str, Tensor] = {}
    for name in layout.blocks:
        block = plain_block(model.get_submodule(name))
        for site in layout.of_block(name):
            seed = options.seed + len(by_site)
            by_site[site.name] = scores(options.criterion, SiteWeights.of(block, site, statistics[site.name], seed=seed))
            # A comparison with NaN is neither true nor false: it would decide at random which units go.
            with at_site(site.name, site.module):
                check_finite(by_site[site.name], what=f"scores of criterion={options.criterion!r}")
    ranked = {site.name: rank_scores(by_site[site.name], site) for site in layout.sites if site.groups}
    mask = allocate({**by_site, **ranked}, counted, budget, options.widths, comparable=criterion.comparable)
    change = CostChange(costs.name, float(costs.dense), float(costs.of({name: mask.kept(name) for name in mask.masks})))
    achieved = change.after / change.before
    level = logging.WARNING if achieved < options.keep - TOLERANCE else logging.INFO
    logger.log(level, "requested %.4f of the %s, achieved %.4f", options.keep, costs.name, achieved)
    mask = best_of_groups(replace(mask, requested=options.keep if options.budget == "params" else None), by_site, layout)
    return Mask.of(mask, by_group), change
