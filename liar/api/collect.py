"""`collect`: what criteria need besides weights, once for every budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from os import PathLike
from typing import Any

from torch import nn

from liar.data import Calibration
from liar.errors import check_choice
from liar.options import HEADS, ReconstructOptions, RunOptions, SelectOptions, check_list
from liar.planning import choose_activations
from liar.progress import ProgressOption, progress_of
from liar.runtime import distributed, exclusive, layout_when_free, open_workspace, run_identity
from liar.selection import CRITERIA, CriterionStatistics, collect_with, stages_of


def collect(
    model: nn.Module,
    calib: Iterable[Any] | Calibration,
    *,
    criteria: Sequence[str] = ("reconstruction",),
    heads: str = SelectOptions.heads,
    activations: str = RunOptions.activations,
    run_folder: str | PathLike[str] | None = RunOptions.run_folder,
    progress: ProgressOption = True,
) -> CriterionStatistics:
    """Collect the statistics that `select` needs once, and reuse them for every budget.

    Args:
        model: a Hugging Face model of a known family; it is not changed.
        calib: calibration batches (see `Calibration.of`).
        criteria: that will be used; what several of them need is collected once.
        heads: as for `select`.
        activations: as for `prune`.
        run_folder: as for `prune`; what was collected is there, too.
        progress: show a bar, or a function that is called in its place (see `ProgressUpdate`).

    Returns:
        Frozen `CriterionStatistics`, to be given to `select` in place of calibration batches.

    Raises:
        OptionError, CalibrationError, ModelError: the message says what was expected and given, and what to do.

    Example:
        >>> statistics = liar.collect(model, calib, criteria=["fluctuation", "wanda"])
        >>> sorted(statistics.sites["neurons.0"])
        ['mean', 'variance']
    """
    check_list("criteria", criteria)
    for criterion in criteria:
        check_choice("criterion", criterion, CRITERIA)
    check_choice("heads", heads, HEADS)
    options = RunOptions(activations, run_folder).checked()
    with distributed.together():
        layout_when_free(model)
        # Read before the model is locked again: an iterable may need another thread to use the model.
        calibration = Calibration.of(calib, model)
        # Nothing is repaired.
        selection = SelectOptions(1.0, next(iter(criteria), "magnitude"))
        place = partial(choose_activations, model, calibration, ReconstructOptions(quality=0), selection=selection)
        identity = partial(run_identity, model, calibration, criteria=" ".join(criteria), heads=heads)
        with (
            exclusive(model),
            open_workspace(options, "collect", identity, place) as workspace,
            progress_of(progress, "collect", stages_of(criteria)) as shown,
        ):
            return collect_with(model, calibration, criteria, heads, shown, workspace)
