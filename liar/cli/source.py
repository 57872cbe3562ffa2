"""The texts that the command line reads: calibration data, and what is left over of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from liar.data import calibration, evenly, texts
from liar.errors import CalibrationError
from liar.options import CalibrationOptions, SourceOptions
from liar.repair import sequences_to_compare

logger = logging.getLogger(__name__)

# Characters that make about one token, with room to spare: how much of the texts that are left over is read.
CHARACTERS = 8


class SourceTexts:
    """Texts that are read once, from the first on.

    Args:
        source: where they are.
        tokenizer: of the model.
        options: how they become batches.
    """

    def __init__(self, source: SourceOptions, tokenizer: Any, options: CalibrationOptions) -> None:
        self._lines = texts(source.calib, config=source.config, split=source.split, column=source.column)
        self._tokenizer, self._options = tokenizer, options

    def batches(self, *, progress: bool = True) -> list[dict[str, Tensor]]:
        """Calibration batches, of as many tokens as the options say."""
        return calibration(self._lines, self._tokenizer, **asdict(self._options), progress=progress)

    def left_over(self, quality: int | str, batches: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]] | None:
        """Batches of the texts that come after those of the calibration; None if there are none, or none are needed.

        Args:
            quality: how many sequences are compared; see `ReconstructOptions`.
            batches: the calibration batches.
        """
        count = sequences_to_compare(quality, sum(len(batch["input_ids"]) for batch in batches))
        some = list(self._some(count, CHARACTERS * count * self._options.max_length)) if count else []
        if not some:
            return None
        try:
            more = calibration(some, self._tokenizer, **asdict(replace(self._options, tokens=None)), progress=False)
        except CalibrationError as error:
            logger.info("no texts are left over to compare outputs on: %s", error)
            return None
        # Long texts make several sequences each.
        rows = [(number, row) for number, batch in enumerate(more) for row in range(len(batch["input_ids"]))]
        chosen = [rows[place] for place in evenly(len(rows), count).tolist()]
        return [
            {name: value[[row for place, row in chosen if place == number]] for name, value in batch.items()}
            for number, batch in enumerate(more)
            if any(place == number for place, _ in chosen)
        ]

    def _some(self, count: int, characters: int) -> Iterator[Any]:
        """The next texts that are not blank: so many and, where they are to be joined, with so many characters."""
        for text in self._lines:
            if isinstance(text, str) and not text.strip():
                continue
            yield text
            count, characters = count - 1, characters - len(str(text))
            if count <= 0 and (not self._options.pack or characters <= 0):
                return
