"""From a walk to a smaller model: the cut and repaired copies of the blocks take the place of the blocks, all at the end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch import nn

from liar.data import Calibration
from liar.mask import Mask
from liar.models import Layout, forget_unused
from liar.repair.step import RepairStep
from liar.repair.walker import walk_blocks
from liar.runtime import distributed
from liar.surgery import adopt, all_or_nothing, check_adoptable, update_config


def apply_steps(
    model: nn.Module,
    layout: Layout,
    calibration: Calibration,
    steps: Sequence[RepairStep],
    mask: Mask,
    *,
    teacher: nn.Module | None = None,
    has_pruned_stream: bool = True,
    clock: defaultdict[str, float] | None = None,
) -> None:
    """Cut a model and repair it with some steps, in place; on an error it is as it was.

    Args:
        model: changed at the very end.
        layout: its sites.
        calibration: batches for it.
        steps: what is done at every site, in order.
        mask: the units that stay.
        teacher: as for `walk_blocks`.
        has_pruned_stream: as for `walk_blocks`.
        clock: as for `walk_blocks`.

    Raises:
        ModelError, CalibrationError: as `walk_blocks`; or a step has added or removed modules or parameters.

    Example:
        >>> from liar.options import ReconstructOptions
        >>> from liar.repair import RepairContext, apply_steps, closed_form_steps
        >>> context = RepairContext(ReconstructOptions(), advance=lambda: None)
        >>> layout, batches = liar.discover(model), liar.Calibration.of(calib, model)
        >>> apply_steps(model, layout, batches, closed_form_steps(context), mask)
        >>> [report.site for report in context.reports]
        ['heads.0', 'neurons.0', 'heads.1', 'neurons.1']
    """
    with distributed.together():
        pruned_blocks = walk_blocks(
            model, layout, calibration, steps, mask=mask, teacher=teacher, has_pruned_stream=has_pruned_stream, clock=clock
        )
        adopt_blocks(model, layout, pruned_blocks)


def adopt_blocks(model: nn.Module, layout: Layout, pruned_blocks: Sequence[nn.Module]) -> None:
    """Put the cut and repaired copies of the blocks in the place of a model's own; on an error it is as it was.

    Raises:
        ModelError: a copy has other modules or parameters than its block.
    """
    pairs = [(model.get_submodule(name), pruned) for name, pruned in zip(layout.blocks, pruned_blocks, strict=True)]
    for pair in pairs:
        check_adoptable(*pair)
    # Nothing above has touched the model.
    with all_or_nothing(model):
        for pair in pairs:
            adopt(*pair)
        update_config(model)
        forget_unused(model)
