"""The three verbs: `select`, `reconstruct`, `prune`. They read like the drawing in docs/theory.md."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor, nn

from liar.data import Calibration, read_by
from liar.errors import CalibrationError, OptionError, at_site
from liar.mask import Mask
from liar.models import Layout, layout_with_weights, transformer_in
from liar.options import ReconstructOptions, SelectOptions
from liar.progress import Progress, ProgressOption, progress_of
from liar.repair import RepairContext, apply_steps, closed_form_steps
from liar.report import Report
from liar.runtime import exclusive
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
    collect,
    flops_of,
    latency,
    params_of,
    rank_scores,
    scores,
    stages_of,
)
from liar.statistics import check_finite
from liar.surgery import all_or_nothing, stock_counts

logger = logging.getLogger(__name__)

COSTS: Mapping[str, Callable[[nn.Module, Layout, Progress], Costs]] = {
    "params": lambda _model, layout, _: params_of(layout),
    "flops": lambda model, layout, _: flops_of(model, layout),
    "latency": lambda model, _, progress: latency(model, progress=progress),
}
# The stage of a reconstruction, and about how many forward passes of the dense model it takes; see `Progress`.
RECONSTRUCT_STAGES = {"reconstruct": 2.4}


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
    progress: ProgressOption = True,
) -> Mask:
    """Decide which heads and neurons stay.

    Args:
        model: a Hugging Face model of a known family, or a model of sentence-transformers; it is not changed.
        calib: calibration batches (see `Calibration.of`), or what `collect` made of them; may be left out for criteria
            that look at weights only. For a model of sentence-transformers also strings, or pairs of strings.
        keep: share of the budget that stays, in (0, 1]. The costs of the mask never exceed it, and meet it within 1 % where
            widths are free. (A share of measured time is met as far as the measured times add up.)
        criterion: `"reconstruction"`: what the output loses without the unit once the rest is reconstructed;
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
        progress: show a bar, or a function that is called in its place (see `ProgressUpdate`).

    Returns:
        A `Mask`; `mask.requested` is `keep` if the budget is in parameters.

    Raises:
        OptionError, BudgetError, CalibrationError, ModelError: with what was expected, what came, and what to do.

    Example:
        >>> mask = liar.select(model, calib, keep=0.5)
        >>> mask.parameters(liar.discover(model)) <= 0.5 * liar.discover(model).parameters
        True
    """
    options = SelectOptions(keep, criterion, budget, widths, round_to, protect, seed, heads)
    return select_with(model, calib, options, progress=progress)


def select_with(
    model: nn.Module,
    calib: Iterable[Any] | Calibration | CriterionStatistics | None,
    options: SelectOptions,
    *,
    progress: ProgressOption | Progress = True,
) -> Mask:
    """`select` with its options in one object."""
    options = options.checked()
    if isinstance(options.budget, Mapping):
        raise OptionError("budget: expected liar.Costs, got a mapping; liar.Costs.from_json reads what they were saved as")
    model, calib = _inside(model, calib)
    # Read before the model is locked: an iterable may need another thread, or this one, to use the model.
    if CRITERIA[options.criterion].needs and calib is not None and not isinstance(calib, CriterionStatistics):
        _layout(model)
        calib = Calibration.of(calib, model)
    given = isinstance(calib, CriterionStatistics)
    with exclusive(model), progress_of(progress, "select", _stages(options, collects=not given)) as shown:
        return _select(model, calib, options, shown)


def _stages(options: SelectOptions, *, collects: bool = True) -> dict[str, float]:
    """The stages of a selection; see `Progress`."""
    timed = {"latency": 2.0} if options.budget == "latency" else {}
    return timed | (stages_of([options.criterion]) if collects else {})


def _select(
    model: nn.Module,
    calib: Iterable[Any] | Calibration | CriterionStatistics | None,
    options: SelectOptions,
    progress: Progress,
) -> Mask:
    criterion = CRITERIA[options.criterion]
    by_group = layout_with_weights(model)
    layout = by_group.counted_by(options.heads)
    counted = by_rank(layout)
    if counted != layout and not (isinstance(options.budget, str) and options.budget in ("params", "flops")):
        raise OptionError(
            "heads='query' needs budget='params' or 'flops': other costs are known for whole groups of heads only"
        )
    costs = COSTS[options.budget](model, counted, progress) if isinstance(options.budget, str) else options.budget
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
            statistics = collect(model, calib, criteria=[options.criterion], heads=options.heads, progress=progress).sites
    by_site = {}
    for number, site in enumerate(layout.sites):
        weights = SiteWeights.of(model.get_submodule(site.block), site, statistics[site.name], seed=options.seed + number)
        by_site[site.name] = scores(options.criterion, weights)
        # A comparison with NaN is neither true nor false: it would decide at random which units go.
        with at_site(site.name, site.module):
            check_finite(by_site[site.name], what=f"scores of criterion={options.criterion!r}")
    ranked = {site.name: rank_scores(by_site[site.name], site) for site in layout.sites if site.groups}
    mask = allocate({**by_site, **ranked}, counted, budget, options.widths, comparable=criterion.comparable)
    achieved = costs.of({name: mask.kept(name) for name in mask.masks}) / costs.dense
    level = logging.WARNING if achieved < options.keep - TOLERANCE else logging.INFO
    logger.log(level, "requested %.4f of the %s, achieved %.4f", options.keep, costs.name, achieved)
    mask = best_of_groups(replace(mask, requested=options.keep if options.budget == "params" else None), by_site, layout)
    return Mask.of(mask, by_group)


def reconstruct(
    model: nn.Module,
    mask: Mask | Mapping[str, Any],
    calib: Iterable[Any],
    *,
    target: str = ReconstructOptions.target,
    ridge: float | str = ReconstructOptions.ridge,
    drift_ridge: float | None = ReconstructOptions.drift_ridge,
    refit: bool = ReconstructOptions.refit,
    solver: str = ReconstructOptions.solver,
    bias: str = ReconstructOptions.bias,
    progress: ProgressOption = True,
) -> Report:
    """Remove what the mask removes, repair the rest by least squares, and leave a smaller model in place.

    Args:
        model: a Hugging Face model of a known family, or a model of sentence-transformers; changed in place at the very end,
            or not at all on an error.
        mask: a `Mask`, or one made elsewhere (see `Mask.of`).
        calib: calibration batches (see `Calibration.of`); for a model of sentence-transformers also strings, or pairs of them.
        target: what the kept channels are fitted to. `"layer_output"`: the consumer's own output on the dense model's
            activations (our reading of LIAR). `"residual_stream"`: what the dense model's residual stream is after the layer,
            less what the pruned model's stream is before it, on the pruned model's activations.
        ridge: pull toward the kept weights, relative to the mean diagonal of the Gram matrix; 0 is none. `"auto"` chooses
            it per site on held-out sequences, and keeps the weights as they are where no update is better.
        drift_ridge: with `"residual_stream"`, a ridge of its own for what the pruned stream has lost before a layer; what the
            layer gives by itself has `ridge`. 1 serves language models well whose calibration text is of another kind than what
            they are for. It takes one more pass over every layer.
        refit: with `"residual_stream"`, first fit the layers that feed the kept units (query, key and value; the first
            feed-forward projections) to what they give in the dense model, since their input has drifted.
        solver: `"auto"`, `"cholesky"`, `"eigh"` or `"lstsq"`.
        bias: `"preserve"`: a bias is refitted where the consumer has one. `"create"`: consumers without get one, as the
            report says; the stock classes may then be unable to load the model.
        progress: show a bar, or a function that is called in its place (see `ProgressUpdate`).

    Returns:
        A `Report`: what was kept, errors before and after, and a verdict for every site.

    Raises:
        OptionError, MaskError, CalibrationError, ModelError: with what was expected, what came, and what to do; the
            model is then as it was.

    Example:
        >>> report = liar.reconstruct(model, mask, calib)
        >>> report.sites[0].verdict.value
        'ridged'
    """
    return reconstruct_with(
        model, mask, calib, ReconstructOptions(target, ridge, drift_ridge, refit, solver, bias), progress=progress
    )


def reconstruct_with(
    model: nn.Module,
    mask: Mask | Mapping[str, Any],
    calib: Iterable[Any] | Calibration,
    options: ReconstructOptions,
    *,
    progress: ProgressOption | Progress = True,
) -> Report:
    """`reconstruct` with its options in one object."""
    options = options.checked()
    model, calib = _inside(model, calib)
    mask, calibration = Mask.of(mask, _layout(model)), Calibration.of(calib, model)
    with exclusive(model), progress_of(progress, "reconstruct", RECONSTRUCT_STAGES) as shown:
        return _reconstruct(model, mask, calibration, options, shown)


def _reconstruct(
    model: nn.Module, mask: Mask, calibration: Calibration, options: ReconstructOptions, progress: Progress
) -> Report:
    layout = layout_with_weights(model)
    before = _parameters(model)
    clock: defaultdict[str, float] = defaultdict(float)
    # The stage ends when the model has changed, and a function of the caller's may raise there.
    with all_or_nothing(model), progress.stage("reconstruct", len(layout.sites)) as advance:
        context = RepairContext(options, lambda: advance(1))
        steps, on_stream = closed_form_steps(context), options.target == "residual_stream"
        apply_steps(model, layout, calibration, steps, mask, has_pruned_stream=on_stream, clock=clock)
    return Report(
        sites=tuple(context.reports),
        requested=mask.requested,
        achieved=mask.parameters(layout) / layout.parameters,
        parameters=(before, _parameters(model)),
        tokens=calibration.tokens,
        sequences=calibration.sequences,
        options=asdict(options),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        seconds={**progress.seconds, **clock},
    )


def _inside(model: nn.Module, calib: Any) -> tuple[nn.Module, Any]:
    """The transformer inside a model of sentence-transformers, and texts as that model reads them; others as they are."""
    inner = transformer_in(model)
    return (model, calib) if inner is model else (inner, read_by(model, calib))


def _layout(model: nn.Module) -> Layout:
    """The sites of a model, which no other thread works with meanwhile."""
    with exclusive(model):
        return layout_with_weights(model)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def prune(
    model: nn.Module,
    calib: Iterable[Any],
    *,
    keep: float,
    criterion: str = SelectOptions.criterion,
    budget: str | Costs = SelectOptions.budget,
    widths: str = SelectOptions.widths,
    round_to: int = SelectOptions.round_to,
    protect: Sequence[str | int] = SelectOptions.protect,
    seed: int = SelectOptions.seed,
    heads: str = SelectOptions.heads,
    target: str = ReconstructOptions.target,
    ridge: float | str = ReconstructOptions.ridge,
    drift_ridge: float | None = ReconstructOptions.drift_ridge,
    refit: bool = ReconstructOptions.refit,
    solver: str = ReconstructOptions.solver,
    bias: str = ReconstructOptions.bias,
    progress: ProgressOption = True,
) -> Report:
    """`select` and `reconstruct` in one: the model comes out smaller, in place. Options are theirs.

    Example:
        >>> report = liar.prune(model, calib, keep=0.5)
        >>> report.achieved <= 0.5
        True
    """
    selection = SelectOptions(keep, criterion, budget, widths, round_to, protect, seed, heads)
    how = ReconstructOptions(target, ridge, drift_ridge, refit, solver, bias)
    selection.check()
    how.check()
    model, calib = _inside(model, calib)
    _layout(model)
    calibration = Calibration.of(calib, model)
    with exclusive(model), prune_progress(progress, selection) as shown:
        mask = select_with(model, calibration, selection, progress=shown)
        return with_selection(reconstruct_with(model, mask, calibration, how, progress=shown), selection)


def with_selection(report: Report, selection: SelectOptions) -> Report:
    """A report that names the criterion by which units were selected, the budget and the rule for widths too."""
    budget = selection.budget if isinstance(selection.budget, str) else selection.budget.name
    chosen = {"criterion": selection.criterion, "budget": budget, "widths": selection.widths}
    return replace(report, options={**chosen, **report.options})


def prune_progress(progress: ProgressOption | Progress, selection: SelectOptions) -> AbstractContextManager[Progress]:
    """The progress of a selection and a reconstruction, as one."""
    return progress_of(progress, "prune", {**_stages(selection), **RECONSTRUCT_STAGES})
