"""What was found of a table and what was not, field by field."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from liar.errors import ModelError
from liar.models import model_type_of

MOST = 3


class NotFoundError(Exception):
    """A field of the table could not be found; says what was seen instead."""

    def __init__(self, name: str, seen: str) -> None:
        super().__init__(f"{name}: {seen}")


@dataclass
class Findings:
    """The fields found so far, and those that were looked for in vain."""

    found: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Note a field that could not be found, and go on with the others."""
        try:
            yield
        except NotFoundError as error:
            self.missing.append(str(error))

    def error(self, model: nn.Module) -> ModelError:
        """One error with everything: the fields that are missing and what was seen, and what was found."""
        lines = [f"no table was found for {type(model).__name__} (model_type {model_type_of(model)!r})"]
        # After several attempts the first, the likeliest, says most.
        lines += [f"- not found: {each}" for each in list(dict.fromkeys(self.missing))[:MOST]]
        lines += [f"- found: {each}" for each in self.found]
        return ModelError("\n".join([*lines, "If a table can describe the model, write it by hand: docs/extending.md"]))
