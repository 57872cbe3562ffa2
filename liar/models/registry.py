"""The known families of models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from torch import nn

from liar.errors import ModelError
from liar.models import tables
from liar.models.family import Family
from liar.models.refused import REFUSED


def _shipped() -> Iterator[Family]:
    """The tables in the files of `liar/models/tables`: a new file there is known without another change."""
    for module in sorted(iter_modules(tables.__path__), key=lambda actual: actual.name):
        yield from import_module(f"{tables.__name__}.{module.name}").FAMILIES


_FAMILIES: dict[str, Family] = {family.model_type: family for family in _shipped()}


def register(family: Family) -> None:
    """Make a family known to every function of this library; an entry of the same `model_type` is replaced.

    Check a new family with `liar.testing.check_family` on a tiny random model.

    Example:
        >>> from dataclasses import replace
        >>> from liar.models.tables.bert import BERT
        >>> liar.register(replace(BERT, model_type="my-bert"))
        >>> _ = _FAMILIES.pop("my-bert")

    Raises:
        ModelError: it is no `Family`.
    """
    if not isinstance(family, Family):
        raise ModelError(f"expected a liar.Family, got a {type(family).__name__}")
    _FAMILIES[family.model_type] = family


def families() -> tuple[Family, ...]:
    """All known families.

    Example:
        >>> {"bert", "gpt2", "llama"} <= {family.model_type for family in liar.families()}
        True
    """
    return tuple(_FAMILIES.values())


def model_type_of(model: Any) -> str | None:
    """The `model_type` in a model's configuration; None where there is none."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return model_type if isinstance(model_type, str) and model_type else None


def is_registered(model_type: Any) -> bool:
    """Whether there is a family of this `model_type`."""
    return isinstance(model_type, str) and model_type in _FAMILIES


def family_of(model: nn.Module) -> Family:
    """The family of a Hugging Face model.

    Raises:
        ModelError: the model has no `config.model_type`, or one that nobody registered.
    """
    model_type = model_type_of(model)
    if model_type in _FAMILIES:
        return family_for(model.config)
    actual = f"config.model_type={model_type!r}" if model_type else f"a {type(model).__name__} without config.model_type"
    if model_type in REFUSED:
        raise ModelError(f"{actual} cannot be cut: {REFUSED[model_type]}")
    near = ", ".join(get_close_matches(str(model_type), _FAMILIES, n=3))
    among = f" (among them {near})" if near else ""
    raise ModelError(
        f"expected a model of a known family, got {actual}; `liar families` lists the {len(_FAMILIES)} that are known"
        f"{among}; liar.propose_family(model, batch) looks for the table of another one, liar.register adds it, see "
        "docs/extending.md"
    )


def family_for(config: Any) -> Family:
    """The table for models with a configuration, of a `model_type` that is registered."""
    return _FAMILIES[config.model_type].fitting(config)


@contextmanager
def registered(family: Family) -> Iterator[None]:
    """Make a family known until the block ends; what was known for its `model_type` before is then known again."""
    before = _FAMILIES.get(family.model_type)
    register(family)
    try:
        yield
    finally:
        if before is None:
            _FAMILIES.pop(family.model_type, None)
        else:
            register(before)
