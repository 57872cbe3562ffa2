"""What is found after an interruption: a whole folder of one of the expected models and nothing beside, or a `Fault`."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from transformers import AutoTokenizer

import liar
from liar.testing.state import same_bits


class Fault(Exception):
    """The library has broken its promise."""


class Expected(NamedTuple):
    """A model folder as an undisturbed run has written it."""

    keep: float
    files: Mapping[str, bytes]
    tensors: Mapping[str, Tensor]


def expected_model(out: Path, keep: float) -> Expected:
    """What a folder holds now."""
    return Expected(keep, tree(out), tensors(out))


def tree(folder: Path) -> dict[str, bytes]:
    """All that is in a folder, hidden or not: names to contents; a folder has none."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def tensors(folder: Path) -> dict[str, Tensor]:
    """The weights as `liar.load` gives them."""
    return {name: value.clone() for name, value in liar.load(folder).state_dict().items()}


def check_model(out: Path, models: Sequence[Expected], allowed: Collection[int]) -> int:
    """Check that a folder is, from the first byte to the last, one of the allowed models; its number."""
    try:
        loaded = tensors(out)
        ids = AutoTokenizer.from_pretrained(out)("w1 w7")["input_ids"]
    except Exception as error:
        raise Fault(f"{out.name} does not load: {type(error).__name__}: {error}") from error
    if len(ids) != 2:
        raise Fault(f"the tokenizer of {out.name} gives {ids} for two words")
    files = tree(out)
    try:
        keep = json.loads(files["run.json"])["run"]["select"]["keep"]
        number = [model.keep for model in models].index(keep)
    except (LookupError, TypeError, ValueError) as error:
        raise Fault(f"run.json of {out.name} names none of the models: {error!r}") from error
    if wrong := different(files, models[number].files):
        raise Fault(f"{out.name} is a mixture: run.json is that of keep={keep}, not so {', '.join(wrong)}")
    same = loaded.keys() == models[number].tensors.keys()
    if not same or not all(same_bits(value, models[number].tensors[name]) for name, value in loaded.items()):
        raise Fault(f"{out.name} loads with other weights than those saved with keep={keep}")
    if number not in allowed:
        expected = " or ".join(str(models[each].keep) for each in sorted(allowed))
        raise Fault(f"{out.name} is a whole model, but of keep={keep}; expected that of keep={expected}")
    return number


def different(files: Mapping[str, bytes], others: Mapping[str, bytes]) -> list[str]:
    """Names of files that differ or are on one side only; seconds in reports may differ."""
    names = sorted(files.keys() | others.keys())
    return [name for name in names if name not in files or name not in others or _read(name, files) != _read(name, others)]


def _read(name: str, files: Mapping[str, bytes]) -> Any:
    if name != "report.json":
        return files[name]
    try:
        content = json.loads(files[name])
        for entry in (content, *content["sites"]):
            del entry["seconds"]
    except (LookupError, TypeError, ValueError):
        return files[name]
    return content
