"""What a repair is fitted to, and what its result is compared on."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from liar.data import Calibration, distinct_from, set_aside, spread, take_sequences, transformer_and_data
from liar.errors import CalibrationError, ModelError, OptionError
from liar.mask import Mask
from liar.models import Layout
from liar.options import ReconstructOptions
from liar.repair.comparison import MOST, compare_outputs, sequences_to_compare
from liar.report import Quality
from liar.runtime import distributed
from liar.verdicts import OutputVerdict

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RepairData:
    """The data of one reconstruction.

    Attributes:
        calibration: what is fitted to.
        compared: sequences on which the result is compared with the dense model; None for no comparison.
        held_out: whether these are not among what is fitted to, nor copies of it.
    """

    calibration: Calibration
    compared: Calibration | None = None
    held_out: bool = False

    def compare(
        self, model: nn.Module, layout: Layout, mask: Mask, blocks: Sequence[nn.Module], *, teacher: nn.Module | None = None
    ) -> Quality | None:
        """`compare_outputs` on this data, with a warning where it is no good news; None where nothing can be compared."""
        if self.compared is None:
            return None
        try:
            with distributed.together():
                quality = compare_outputs(model, layout, mask, blocks, self.compared, held_out=self.held_out, teacher=teacher)
        except (ModelError, CalibrationError) as error:
            # The blocks are repaired; what comes after them cannot be run, or gives nothing that can be compared.
            logger.warning("the output was not compared with the dense model's: %s", error)
            return None
        if quality.verdict is OutputVerdict.NOT_BETTER:
            logger.warning(
                "on %s, the output of the repaired model is %s: %s",
                quality.where, quality.verdict.text, "; ".join(map(str, quality.measures)),
            )  # fmt: skip
        return quality


def repair_data(
    model: nn.Module, calib: Iterable[Any] | Calibration, options: ReconstructOptions, *, held_out: Iterable[Any] | None = None
) -> RepairData:
    """What the user gave, checked, and split where the options say so.

    Args:
        model: the user's model, which may have its transformer inside.
        calib: calibration batches, or texts for a model of sentence-transformers.
        options: of them `quality` and `set_aside`.
        held_out: further batches or texts to compare on.

    Raises:
        OptionError: options that contradict each other.
        CalibrationError: unusable data, or nothing can be set aside.
    """
    _check_choice(options, is_given=held_out is not None)

    def read(data: Any) -> Calibration:
        inner, batches = transformer_and_data(model, data)
        return Calibration.of(batches, inner)

    calibration = read(calib)
    count = sequences_to_compare(options.quality, calibration.sequences)
    if not count:
        return RepairData(calibration)
    if options.set_aside:
        return RepairData(*set_aside(calibration, count), held_out=True)
    if held_out is None:
        return RepairData(calibration, take_sequences(calibration, spread(calibration, count)))
    other = read(held_out)
    distinct = distinct_from(other, calibration)
    repeated, any_left = int((~distinct).sum()), bool(distinct.any())
    if repeated:
        logger.warning(
            "%d of %d held-out sequences repeat calibration sequences, or nearly%s", repeated, other.sequences,
            ", and are left out" if any_left else ": what is compared on them has been seen by the fit",
        )  # fmt: skip
    count = MOST if options.quality == "auto" else count
    chosen = spread(other, count, distinct if any_left else None)
    return RepairData(calibration, take_sequences(other, chosen), held_out=any_left)


def _check_choice(options: ReconstructOptions, *, is_given: bool) -> None:
    for name, given in (("set_aside=True", options.set_aside), ("held_out", is_given)):
        if given and options.quality == 0:
            raise OptionError(f"{name} says which sequences are compared, and quality=0 that none are: leave one of them out")
    if options.set_aside and is_given:
        raise OptionError("set_aside=True and held_out both say which sequences are compared: leave one of them out")
