"""Generated texts as JSON lines that are written as they come, and gone on with after a kill."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from liar.errors import CheckpointError, wrap_parse_errors
from liar.files import user_path

EXPECTED = "texts as liar.self_generate writes them"


@dataclass(frozen=True)
class GeneratedText:
    """One text that was kept.

    Attributes:
        number: its place among all that were generated, from 0: numbers that are missing were rejected.
        text: without special tokens.
        input_ids: its tokens.
    """

    number: int
    text: str
    input_ids: Sequence[int]

    def to_line(self) -> bytes:
        """As a line of JSON, in ASCII."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> GeneratedText:
        """The inverse of `to_line`."""
        content = json.loads(line)
        return cls(int(content["number"]), str(content["text"]), [int(token) for token in content["input_ids"]])


class TextFile:
    """A file of texts that grows batch by batch.

    A kill may leave a batch of which some lines are there, the last perhaps in part. So the last batch is generated again, and
    has to come out as it stands: if it does not, the file is of other settings, or of another model.

    Args:
        path: of the file; it need not be there.
        batch_size: texts that are generated at a time, kept or not.

    Raises:
        CheckpointError: the file cannot be written, or holds something else.
    """

    def __init__(self, path: str | Path, batch_size: int) -> None:
        self.path = user_path(path)
        if self.path.is_dir() or not self.path.parent.is_dir():
            raise CheckpointError(f"{path}: expected a file to write, in a folder that is there; choose another name")
        content = self.path.read_bytes() if self.path.exists() else b""
        lines = content.splitlines(keepends=True)
        complete = [line for line in lines if line.endswith(b"\n")]
        with wrap_parse_errors(CheckpointError, EXPECTED, path):
            texts = [GeneratedText.from_line(line) for line in complete]
            self._check_order(texts)
        self.batch = texts[-1].number // batch_size if texts else 0
        self.texts = [text for text in texts if text.number < self.batch * batch_size]
        # Of the last batch, and perhaps half a line of the next one: what is there, to be compared with what comes.
        self._rest = b"".join(lines[len(self.texts) :])

    @staticmethod
    def _check_order(texts: Sequence[GeneratedText]) -> None:
        numbers = [text.number for text in texts]
        if numbers != sorted(set(numbers)) or (numbers and numbers[0] < 0):
            raise ValueError("numbers that do not ascend")

    @property
    def has_rest(self) -> bool:
        """Whether there are texts that were not generated again yet."""
        return bool(self._rest)

    def check(self, texts: Sequence[GeneratedText]) -> None:
        """Compare the texts of the last batch, generated again, with those that are there.

        Raises:
            CheckpointError: they are others.
        """
        self._compared(texts)

    def _compared(self, texts: Sequence[GeneratedText]) -> tuple[bytes, bytes]:
        """Texts as lines, and what of them is in the file already."""
        lines = b"".join(text.to_line() for text in texts)
        known = self._rest[: len(lines)]
        if not lines.startswith(known):
            raise CheckpointError(
                f"{self.path} holds other texts than this model writes with these settings on this machine: give the settings "
                "that it was written with, or choose another file"
            )
        return lines, known

    def write(self, texts: Sequence[GeneratedText]) -> None:
        """Add the texts of a batch.

        Raises:
            CheckpointError: the file already has others in this place, or cannot be written.
        """
        lines, known = self._compared(texts)
        try:
            with self.path.open("ab") as file:
                file.write(lines[len(known) :])
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path}: {error.strerror}; free space, or choose another file") from error
        self._rest = self._rest[len(known) :]
