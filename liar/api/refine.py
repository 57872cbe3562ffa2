"""The verb `refine`: kept weights trained on a teacher's activations, from wherever the model is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from torch import nn

from liar.data import Calibration, transformer_and_data
from liar.models import Layout, Site, check_one_stack, count_parameters, layout_with_weights, transformer_in
from liar.options import RefineOptions
from liar.progress import Progress, ProgressOption, progress_of
from liar.repair import check_teacher
from liar.repair.refine import Outcome, Window, check_lora, hold_out, last_hidden_error, refine_windows, windows_of
from liar.report import Report, SiteReport
from liar.runtime import exclusive
from liar.surgery import all_or_nothing
from liar.verdicts import Verdict

STAGES = {"refine": 1.0}


def refine(
    model: nn.Module,
    teacher: nn.Module,
    calib: Iterable[Any],
    *,
    granularity: int | str = RefineOptions.granularity,
    propagation: str = RefineOptions.propagation,
    epochs: int = RefineOptions.epochs,
    sequences: int = RefineOptions.sequences,
    learning_rate: float = RefineOptions.learning_rate,
    warmup: float = RefineOptions.warmup,
    patience: int = RefineOptions.patience,
    lora: int | None = RefineOptions.lora,
    seed: int = RefineOptions.seed,
    progress: ProgressOption = True,
) -> Report:
    """Train the kept weights of a pruned model, window by window, until it gives what the dense model gives.

    Every window is trained by AdamW on the mean squared error to the teacher's activations, while everything outside of it is
    frozen. It stops when sequences that are held out no longer gain, and keeps the best weights. Weights that are zero stay
    zero, so that a model with single weights pruned keeps its mask. Norms and embeddings are never trained.

    Nothing gets worse on what is held out: a window that does not gain keeps its weights (verdict `kept_baseline`), and if the
    last hidden states of the whole model are not nearer to the teacher's, all weights are put back (`undone`).

    Args:
        model: a pruned model, repaired or not: changed in place at the very end, or not at all on an error.
        teacher: the dense model: its heads and neurons may differ, its blocks, residual stream and vocabulary may not.
        calib: calibration batches (see `Calibration.of`); for a model of sentence-transformers also strings, or pairs of them.
        granularity: what is trained together: every `"matrix"` by itself, every `"sublayer"` (attention, feed-forward part)
            with its norm and the residual stream, every `"block"`; or windows of so many blocks, of which neighbours share one.
        propagation: `"dense"`: windows read the teacher's activations. `"pruned"`: they read the model's own, and are fitted
            to what the teacher's window makes of the same ones. `"global"`: they read the model's own, and are fitted to the
            teacher's own pass.
        epochs: passes over the calibration data for every window.
        sequences: in one step of the optimizer.
        learning_rate: the largest; it falls linearly to zero.
        warmup: share of the steps in which it rises first.
        patience: passes without gain after which a window ends.
        lora: rank of low-rank updates, which are trained in place of the weights and merged at the end (needs peft).
        seed: of the order of the batches, and of the first low-rank updates.
        progress: show a bar, or a function that is called in its place (see `ProgressUpdate`).

    Returns:
        A `Report` with a line for every window: errors on held-out sequences over the energy of what the window is to add.

    Raises:
        OptionError, CalibrationError, ModelError: with what was expected, what came, and what to do; the model is then as it
            was.

    The granularities are those of Wagner et al. 2025 (arXiv 2510.14444), the propagations those of Shin et al. 2024.

    Example:
        >>> import copy
        >>> slim = copy.deepcopy(model)
        >>> _ = liar.prune(slim, calib, keep=0.5)
        >>> report = liar.refine(slim, model, calib, epochs=1)
        >>> report.sites[0].after <= report.sites[0].before
        True
    """
    options = RefineOptions(granularity, propagation, epochs, sequences, learning_rate, warmup, patience, lora, seed)
    return refine_with(model, teacher, calib, options, progress=progress)


class _Worse(Exception):
    """The model as a whole is no nearer to its teacher: everything is put back."""


def refine_with(
    model: nn.Module,
    teacher: nn.Module,
    calib: Iterable[Any] | Calibration,
    options: RefineOptions,
    *,
    progress: ProgressOption | Progress = True,
) -> Report:
    """`refine` with its options in one object."""
    options = options.checked()
    check_lora(options.lora)
    model, calib = transformer_and_data(model, calib)
    teacher = transformer_in(teacher)
    with exclusive(teacher), exclusive(model):
        layout, dense = layout_with_weights(model), layout_with_weights(teacher)
        check_one_stack(layout, model, "refine")
        check_teacher(teacher, dense, model, layout)
        windows = windows_of(model, layout, teacher, dense, options.granularity)
    calibration = Calibration.of(calib, model)
    data = hold_out(calibration, options.sequences)
    with exclusive(teacher), exclusive(model), progress_of(progress, "refine", STAGES) as shown:
        before = last_hidden_error(model, teacher, data)
        undone = False
        try:
            with all_or_nothing(model), shown.stage("refine", len(windows)) as advance:
                refined = refine_windows(model, layout, teacher, dense, data, options, advance)
                refined.write(model)
                if refined.values and not last_hidden_error(model, teacher, data) < before:
                    raise _Worse
        except _Worse:
            undone = True
    return Report(
        sites=tuple(_line(outcome, layout, dense, undone=undone) for outcome in refined.outcomes),
        requested=None,
        achieved=layout.parameters / dense.parameters,
        parameters=(count_parameters([model]),) * 2,
        tokens=calibration.tokens,
        sequences=calibration.sequences,
        options=asdict(options),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        seconds={**shown.seconds, "refine": sum(outcome.seconds for outcome in refined.outcomes)},
    )


def _line(outcome: Outcome, layout: Layout, dense: Layout, *, undone: bool) -> SiteReport:
    """One window in the report."""
    gained = outcome.verdict is Verdict.REFINED and not undone
    units = [sum(site.units for site in _sites(outcome.window, each)) for each in (layout, dense)]
    return SiteReport(
        site=outcome.window.name,
        module=outcome.window.module,
        kept=units[0],
        total=units[1],
        before=outcome.before,
        after=outcome.after if gained else outcome.before,
        verdict=Verdict.UNDONE if undone and outcome.verdict is Verdict.REFINED else outcome.verdict,
        ridge=0.0 if gained else math.inf,
        condition=math.nan,
        seconds=outcome.seconds,
    )


def _sites(window: Window, layout: Layout) -> list[Site]:
    """The sites that a window is about."""
    sites = [site for number in window.blocks for site in layout.of_block(layout.blocks[number])]
    return sites if window.site is None else [sites[window.site]]
