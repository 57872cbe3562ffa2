"""The three main functions: `select`, `reconstruct`, `prune`; docs/theory.md draws what they do."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor, nn

from liar.data import Calibration, read_by
from liar.errors import CalibrationError, MaskError, OptionError, at_site
from liar.mask import Mask, compose, keep_all
from liar.models import Layout, discover_with_weights, transformer_in
from liar.options import PruneOptions, ReconstructOptions, SelectOptions
from liar.progress import Progress, ProgressOption, progress_of
from liar.repair import RepairContext, apply_steps, check_teacher, closed_form_steps
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
from liar.surgery import all_or_nothing, copy_dense, stock_counts

logger = logging.getLogger(__name__)

COSTS: Mapping[str, Callable[[nn.Module, Layout, Progress], Costs]] = {
    "params": lambda _model, layout, _: params_of(layout),
    "flops": lambda model, layout, _: flops_of(model, layout),
    "latency": lambda model, _, progress: latency(model, progress=progress),
}
# What is left of a budget that can be computed after every step.
STEPPED: Mapping[str, Callable[[nn.Module, Layout], float]] = {
    "params": lambda _, layout: float(layout.parameters),
    "flops": lambda model, layout: flops_of(model, layout).dense,
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
    model, calib = transformer_and_data(model, calib)
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
    by_group = discover_with_weights(model)
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
    mask: Mask | Mapping[str, Any] | None,
    calib: Iterable[Any],
    *,
    teacher: nn.Module | None = None,
    target: str = ReconstructOptions.target,
    ridge: float | str = ReconstructOptions.ridge,
    refit: bool = ReconstructOptions.refit,
    solver: str = ReconstructOptions.solver,
    bias: str = ReconstructOptions.bias,
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
            residual stream and vocabulary may not. It needs `target="residual_stream"`, and is not changed.
        target: what the kept channels are fitted to. `"layer_output"`: the consumer's own output on the dense model's
            activations (our reading of LIAR). `"residual_stream"`: the dense model's residual stream after the layer
            minus the pruned model's stream before it, on the pruned model's activations.
        ridge: pull toward the kept weights, relative to the mean diagonal of the Gram matrix; 0 is none. `"auto"` chooses
            it per site on held-out sequences, and keeps the weights as they are where no update is better.
        refit: with `"residual_stream"`, first fit the layers that feed the kept units (query, key and value; the first
            feed-forward projections) to what they give in the dense model, since their input has drifted.
        solver: `"auto"`, `"cholesky"`, `"eigh"` or `"lstsq"`.
        bias: `"preserve"`: a bias is refitted where the consumer has one. `"create"`: consumers without get one, as the
            report says; the stock classes may then be unable to load the model.
        progress: show a bar, or a function that is called in its place (see `ProgressUpdate`).

    Returns:
        A `Report`: what was kept, errors before and after, and a verdict for every site.

    Raises:
        OptionError, MaskError, CalibrationError, ModelError: the message says what was expected and given, and what to do; the
            model is then as it was.

    Example:
        >>> report = liar.reconstruct(model, mask, calib)
        >>> report.sites[0].verdict.value
        'ridged'
    """
    options = ReconstructOptions(target, ridge, refit, solver, bias)
    return reconstruct_with(model, mask, calib, options, teacher=teacher, progress=progress)


def reconstruct_with(
    model: nn.Module,
    mask: Mask | Mapping[str, Any] | None,
    calib: Iterable[Any] | Calibration,
    options: ReconstructOptions,
    *,
    teacher: nn.Module | None = None,
    progress: ProgressOption | Progress = True,
) -> Report:
    """`reconstruct` with its options in one object."""
    options = options.checked()
    model, calib = transformer_and_data(model, calib)
    layout = _layout(model)
    if teacher is not None:
        teacher = _checked_teacher(transformer_in(teacher), model, layout, options)
    elif mask is None:
        raise MaskError(
            "mask=None cuts nothing, so there is nothing to repair: pass a mask, or the dense model that this one was cut from "
            "as teacher="
        )
    chosen = keep_all(layout) if mask is None else Mask.of(mask, layout)
    calibration = Calibration.of(calib, model)
    with ExitStack() as stack:
        for each in (teacher, model):
            if each is not None:
                stack.enter_context(exclusive(each))
        shown = stack.enter_context(progress_of(progress, "reconstruct", RECONSTRUCT_STAGES))
        return _reconstruct(model, chosen, calibration, options, shown, teacher)


def _checked_teacher(teacher: nn.Module, model: nn.Module, layout: Layout, options: ReconstructOptions) -> nn.Module:
    """A teacher that fits the model and the options."""
    if options.target != "residual_stream":
        raise OptionError(
            f"target={options.target!r} fits a layer to its own output in the model that is cut, so it takes no teacher: use "
            "target='residual_stream'"
        )
    check_teacher(teacher, _layout(teacher), model, layout)
    return teacher


def _reconstruct(
    model: nn.Module,
    mask: Mask,
    calibration: Calibration,
    options: ReconstructOptions,
    progress: Progress,
    teacher: nn.Module | None,
) -> Report:
    layout = discover_with_weights(model)
    dense = layout if teacher is None else discover_with_weights(teacher)
    before = count_parameters(model)
    clock: defaultdict[str, float] = defaultdict(float)
    # The stage ends when the model has changed, and a function of the caller's may raise there.
    with all_or_nothing(model), progress.stage("reconstruct", len(layout.sites)) as advance:
        context = RepairContext(options, lambda: advance(1))
        steps, on_stream = closed_form_steps(context), options.target == "residual_stream"
        apply_steps(model, layout, calibration, steps, mask, teacher=teacher, has_pruned_stream=on_stream, clock=clock)
    return Report(
        sites=tuple(context.reports),
        requested=mask.requested,
        achieved=mask.parameters(layout) / dense.parameters,
        parameters=(before, count_parameters(model)),
        tokens=calibration.tokens,
        sequences=calibration.sequences,
        options=asdict(options),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        seconds={**progress.seconds, **clock},
    )


def transformer_and_data(model: nn.Module, calib: Any) -> tuple[nn.Module, Any]:
    """The transformer inside a model of sentence-transformers, and texts as that model reads them; others as they are."""
    inner = transformer_in(model)
    return (model, calib) if inner is model else (inner, read_by(model, calib))


def _layout(model: nn.Module) -> Layout:
    """The sites of a model, which no other thread works with meanwhile."""
    with exclusive(model):
        return discover_with_weights(model)


def count_parameters(model: nn.Module) -> int:
    """Parameters of a whole model."""
    return sum(parameter.numel() for parameter in model.parameters())


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
    progress: ProgressOption = True,
) -> Report:
    """`select` and `reconstruct` in one call: the model becomes smaller, in place. The options are those of both, and `steps`.

    `steps` is how often to prune and repair: with 2 and `keep=0.25` first to a half, then to a quarter. Units are measured anew
    on the repaired model, which is always fitted to the dense one. More than 1 needs a budget in `"params"` or `"flops"`, and
    the target `"residual_stream"`.

    Example:
        >>> report = liar.prune(model, calib, keep=0.5)
        >>> report.achieved <= 0.5
        True
    """
    selection = SelectOptions(keep, criterion, budget, widths, round_to, protect, seed, heads)
    how = ReconstructOptions(target, ridge, refit, solver, bias)
    return prune_with(model, calib, selection, how, PruneOptions(steps), progress=progress)[1]


def prune_with(
    model: nn.Module,
    calib: Iterable[Any] | Calibration,
    selection: SelectOptions,
    how: ReconstructOptions,
    stepping: PruneOptions,
    *,
    progress: ProgressOption = True,
) -> tuple[Mask, Report]:
    """`prune` with its options in objects: what stays of the model as it was, and the report."""
    selection.check()
    how.check()
    steps = stepping.checked().steps
    _check_steps(steps, selection, how)
    model, calib = transformer_and_data(model, calib)
    dense = _layout(model)
    calibration = Calibration.of(calib, model)
    stages = {**_stages(selection), **RECONSTRUCT_STAGES}
    with exclusive(model), progress_of(progress, "prune", stages, rounds=steps) as shown, all_or_nothing(model):
        if steps == 1:
            mask = select_with(model, calibration, selection, progress=shown)
            report = reconstruct_with(model, mask, calibration, how, progress=shown)
        else:
            mask, report = _prune_in_steps(model, dense, calibration, selection, how, steps, shown)
    return mask, _with_selection(report, selection, steps)


def _check_steps(steps: int, selection: SelectOptions, how: ReconstructOptions) -> None:
    """Check that a model can be pruned in so many steps."""
    if steps == 1:
        return
    if not isinstance(selection.budget, str) or selection.budget not in STEPPED:
        raise OptionError(
            f"steps={steps} needs a budget that is computed anew after every step: budget='params' or 'flops', by its name"
        )
    if how.target != "residual_stream":
        raise OptionError(f"steps={steps} fits to the dense model: it needs target='residual_stream', not {how.target!r}")


def _prune_in_steps(
    model: nn.Module,
    dense: Layout,
    calibration: Calibration,
    selection: SelectOptions,
    how: ReconstructOptions,
    steps: int,
    progress: Progress,
) -> tuple[Mask, Report]:
    """Select and reconstruct, again and again, to shares that fall by one ratio; the dense model stays the target."""
    teacher, before = copy_dense(model), count_parameters(model)
    whole = STEPPED[str(selection.budget)](model, dense)
    mask, report = None, None
    seconds: defaultdict[str, float] = defaultdict(float)
    for number in range(1, steps + 1):
        left = STEPPED[str(selection.budget)](model, discover_with_weights(model))
        share = min(1.0, selection.keep ** (number / steps) * whole / left)
        chosen = select_with(model, calibration, replace(selection, keep=share), progress=progress)
        report = reconstruct_with(model, chosen, calibration, how, teacher=None if number == 1 else teacher, progress=progress)
        mask = chosen if mask is None else compose(mask, chosen)
        for name, value in report.seconds.items():
            # What the progress counts is counted over all steps.
            seconds[name] = value if name in progress.seconds else seconds[name] + value
    assert mask is not None
    assert report is not None
    requested = selection.keep if selection.budget == "params" else None
    return replace(mask, requested=requested), replace(
        report,
        sites=tuple(replace(site, total=len(mask[site.site])) for site in report.sites),
        requested=requested,
        achieved=discover_with_weights(model).parameters / dense.parameters,
        parameters=(before, count_parameters(model)),
        seconds=dict(seconds),
    )


def _with_selection(report: Report, selection: SelectOptions, steps: int) -> Report:
    """A report that names the criterion by which units were selected, the budget, the rule for widths and the steps too."""
    budget = selection.budget if isinstance(selection.budget, str) else selection.budget.name
    chosen = {"criterion": selection.criterion, "budget": budget, "widths": selection.widths}
    return replace(report, options={**chosen, **({"steps": steps} if steps > 1 else {}), **report.options})
