"""The three verbs: `select`, `reconstruct`, `prune`. They read like the drawing in docs/theory.md."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from liar import slim
from liar.batches import Calibration
from liar.capture import preserved
from liar.collect import Statistics, collect
from liar.costs import Costs, flops, params
from liar.criteria import CRITERIA, SCOPES, TOLERANCE, Budget, Units, allocate, check_drop, check_keep, scores
from liar.errors import BudgetError, CalibrationError, choose
from liar.families import checked
from liar.mask import Mask
from liar.rebuild import BIASES, TARGETS, Job, Options, rebuild
from liar.report import Report
from liar.solve import SOLVERS, check_ridge
from liar.timing import latency

logger = logging.getLogger(__name__)

BUDGETS: Mapping[str, Callable[[nn.Module, bool], Costs]] = {
    "params": lambda model, _: params(model),
    "flops": lambda model, _: flops(model),
    "latency": lambda model, progress: latency(model, progress=progress),
}


def select(
    model: nn.Module,
    calib: Iterable[Any] | Statistics | None = None,
    *,
    keep: float,
    criterion: str = "reconstruction",
    scope: str = "global",
    budget: str | Costs = "params",
    round_to: int = 1,
    uniform: bool = False,
    protect: Sequence[str | int] = (),
    drop: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Mask:
    """Decide which heads and neurons stay.

    Args:
        model: a Hugging Face model of a known family; it is not changed.
        calib: calibration batches (see `Calibration.of`), or what `collect` made of them; may be left out for criteria
            that look at weights only.
        keep: share of the budget that stays, in (0, 1]; never exceeded, and met within 1 % where widths are free.
        criterion: `"reconstruction"`: what the output loses without the unit once the rest is reconstructed;
            `"fluctuation"`, `"wanda"`, `"magnitude"`, `"random"`; from gradients of the loss, of the batches' `labels` if they
            have any: `"taylor"`, `"fisher"`, `"snip"`.
        scope: `"global"`: all units compete; `"layer"`: the same share of every layer, or nearly so.
        budget: what `keep` is a share of: `"params"`, parameters in the transformer blocks; `"flops"`, matrix products in the
            blocks for sequences of 128 tokens, or what `flops` says for others; `"latency"`, time of the whole model for
            one sequence of 128 tokens, or what `latency` has measured for others.
        round_to: heads and neurons of a layer keep a multiple of so many channels (or all), for hardware that likes it.
        uniform: the same numbers in every layer, and only those with which the stock class can load the model.
        protect: names of sites (`"heads.0"`) and numbers of layers that stay whole.
        drop: a layer's attention or feed-forward part may go as a whole, where that loses least; the report names those that
            did. Only with scope `"global"`, without `uniform`, and with a criterion that can compare units of different sites:
            `"reconstruction"`, `"taylor"`, `"fisher"`, `"snip"`.
        seed: for `"random"`.
        progress: show a bar.

    Returns:
        A `Mask`; `mask.asked` is `keep` if the budget is in parameters.

    Raises:
        OptionError, BudgetError, CalibrationError, ModelError: with what was expected, what came, and what to do.

    Example:
        >>> mask = liar.select(model, calib, keep=0.5)
        >>> mask.parameters(liar.families.discover(model)) <= 0.5 * liar.families.discover(model).parameters
        True
    """
    choose("criterion", criterion, list(CRITERIA))
    choose("scope", scope, list(SCOPES))
    if isinstance(budget, str):
        choose("budget", budget, list(BUDGETS))
    check_keep(keep)
    if drop:
        check_drop(criterion, scope, uniform=uniform)
    layout = checked(model)
    if uniform and layout.dropped:
        raise BudgetError(
            f"uniform: no stock class leaves a sub-layer out, and this model has lost {', '.join(layout.dropped)}"
        )
    costs = BUDGETS[budget](model, progress) if isinstance(budget, str) else budget
    possible = slim.stock_counts(model) if uniform else None
    wanted = Budget.of(layout, costs, keep, round_to=round_to, possible=possible, protect=protect, drop=drop)
    if drop and not any(least == 0 for least in wanted.least.values()):
        logger.warning("drop: the %s of no site without units are known, so none is dropped; measure them anew", costs.name)
    known: Mapping[str, Mapping[str, Tensor]] = {site.name: {} for site in layout.sites}
    if CRITERIA[criterion].needs:
        if calib is None:
            raise CalibrationError(f"criterion={criterion!r} looks at activations: pass calibration batches")
        if isinstance(calib, Statistics):
            calib.check(model, layout, criterion)
            known = calib.sites
        else:
            known = collect(model, calib, criteria=[criterion], progress=progress).sites
    found = {}
    for number, site in enumerate(layout.sites):
        block = model.get_submodule(site.block)
        found[site.name] = scores(criterion, Units.of(block, site, known[site.name], seed=seed + number))
    sets = {name: values[kept] for name, values in known.items()} if (kept := CRITERIA[criterion].sets) else {}
    mask = allocate(found, layout, wanted, scope, comparable=CRITERIA[criterion].comparable, sets=sets)
    got = costs.of({name: mask.kept(name) for name in mask.keep}) / costs.dense
    level = logging.WARNING if got < keep - TOLERANCE else logging.INFO
    logger.log(level, "asked to keep %.4f of the %s, got %.4f", keep, costs.name, got)
    return replace(mask, asked=keep) if budget == "params" else mask


def reconstruct(
    model: nn.Module,
    mask: Mask | Mapping[str, Any],
    calib: Iterable[Any],
    *,
    target: str = "dense_stream",
    ridge: float | str = "auto",
    refit: bool = True,
    solver: str = "auto",
    bias: str = "keep",
    progress: bool = True,
) -> Report:
    """Remove what the mask removes, repair the rest by least squares, and leave a smaller model in place.

    Args:
        model: a Hugging Face model of a known family; changed in place at the very end, or not at all on an error.
        mask: a `Mask`, or one made elsewhere (see `Mask.of`).
        calib: calibration batches (see `Calibration.of`).
        target: what the kept channels are fitted to. `"same_input"`: the consumer's own output on the dense model's
            activations (our reading of LIAR). `"dense_stream"`: what the dense model's residual stream is after the layer,
            less what the pruned model's stream is before it, on the pruned model's activations.
        ridge: pull toward the kept weights, relative to the mean diagonal of the Gram matrix; 0 is none. `"auto"` chooses
            it per site on held-out sequences, and keeps the weights as they are where no update is better.
        refit: with `"dense_stream"`, first fit the layers that feed the kept units (query, key and value; the first
            feed-forward projections) to what they give in the dense model, since their input has drifted.
        solver: `"auto"`, `"cholesky"`, `"eigh"` or `"lstsq"`.
        bias: `"keep"`: a bias is refitted where the consumer has one. `"create"`: consumers without get one, as the
            report says; the stock classes may then be unable to load the model.
        progress: show a bar.

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
    choose("target", target, TARGETS)
    choose("solver", solver, SOLVERS)
    choose("bias", bias, BIASES)
    if ridge != "auto":
        check_ridge(ridge)
    layout = checked(model)
    mask = Mask.of(mask, layout)
    calibration = Calibration.of(calib, model)
    options = Options(target, ridge, refit, solver, bias)
    before = sum(p.numel() for p in model.parameters())
    with preserved(model), tqdm(total=len(layout.sites), desc="reconstruct", unit="site", disable=not progress) as bar:
        job = Job(mask, calibration, options, bar.update)
        students = rebuild(job, model, layout)
    # Nothing above has touched the model; what follows cannot fail half-way.
    for name, student in zip(layout.blocks, students, strict=True):
        slim.adopt(model.get_submodule(name), student)
    slim.note_sizes(model)
    return Report(
        sites=tuple(job.reports),
        asked=mask.asked,
        got=mask.parameters(layout) / layout.parameters,
        parameters=(before, sum(p.numel() for p in model.parameters())),
        tokens=calibration.tokens,
        sequences=calibration.sequences,
        options=asdict(options),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        seconds=dict(job.clock),
    )


def prune(
    model: nn.Module,
    calib: Iterable[Any],
    *,
    keep: float,
    criterion: str = "reconstruction",
    scope: str = "global",
    budget: str | Costs = "params",
    round_to: int = 1,
    uniform: bool = False,
    protect: Sequence[str | int] = (),
    drop: bool = False,
    target: str = "dense_stream",
    ridge: float | str = "auto",
    refit: bool = True,
    solver: str = "auto",
    bias: str = "keep",
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """`select` and `reconstruct` in one: the model comes out smaller, in place. Options are theirs.

    Example:
        >>> report = liar.prune(model, calib, keep=0.5)
        >>> report.got <= 0.5
        True
    """
    calib = calib if isinstance(calib, Sequence) else list(calib)
    mask = select(
        model,
        calib,
        keep=keep,
        criterion=criterion,
        scope=scope,
        budget=budget,
        round_to=round_to,
        uniform=uniform,
        protect=protect,
        drop=drop,
        seed=seed,
        progress=progress,
    )
    return reconstruct(model, mask, calib, target=target, ridge=ridge, refit=refit, solver=solver, bias=bias, progress=progress)
