"""Every option once: its default, its possible values, its check and its help.

Python signatures, `run.json`, the command line's `--help` and the tables in the docs are all made from these classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from fractions import Fraction
from numbers import Integral, Real
from os import PathLike
from typing import Any, TypeVar

import numpy as np

from liar.errors import OptionError, check_choice


@dataclass(frozen=True)
class Option:
    """What is known of one option besides its name, type and default.

    Attributes:
        help: one sentence for people.
        choices: possible values with what each means; None where the values are not a few names.
        check: raises an `OptionError` for a bad value, given the option's name and the value; None where any value is good.
    """

    help: str
    choices: Mapping[str, str] | None = None
    check: Callable[[str, Any], None] | None = None

    def validate(self, name: str, value: Any) -> None:
        """Raise an `OptionError` unless the option, called `name`, may have this value."""
        if self.check:
            self.check(name, value)
        elif self.choices is not None:
            check_choice(name, value, self.choices)


def _option(
    help: str,
    *,
    default: Any = MISSING,
    choices: Mapping[str, str] | None = None,
    check: Callable[[str, Any], None] | None = None,
) -> Any:
    return field(default=default, metadata={"option": Option(help, choices, check)})


# Tokens per sequence where FLOPs or time are asked for by name.
LENGTH = 128
# Larger counts do not fit where numbers of tokens and sequences are kept.
LARGEST_COUNT = 2**31 - 1
# Tokens of a text that a model writes: one at random, the next four greedily, and at least one that is sampled.
SHORTEST_GENERATED = 6
LARGEST_SEED = 2**62
# Of neighbouring inputs, for patterns such as 2:4.
LARGEST_GROUP = 64
# A larger ridge changes nothing, but for overflows.
LARGEST_RIDGE = 1e12


def _shown(value: Any) -> str:
    """A value for an error."""
    try:
        return repr(value)
    except ValueError:  # Python does not write numbers of thousands of digits
        return "a huge number"


def _is_number(value: Any, kind: type) -> bool:
    """Whether a value is a number of some kind, as Python or NumPy has it; True and False are none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def check_share(name: str, value: Any) -> None:
    """Raise an `OptionError` unless the value is a share above 0 and at most 1."""
    if not _is_number(value, Real) or not 0 < value <= 1:
        raise OptionError(f"{name}={_shown(value)}: expected the share that stays, above 0 and at most 1")


def check_count(name: str, value: Any) -> None:
    """Raise an `OptionError` unless the value is an integer from 1 to `LARGEST_COUNT`."""
    if not _is_number(value, Integral) or not 1 <= int(value) <= LARGEST_COUNT:
        raise OptionError(f"{name}={_shown(value)}: expected a whole number, at least 1 and at most {LARGEST_COUNT:,}")


def check_generated_length(name: str, value: Any) -> None:
    """Raise an `OptionError` unless the value is a count that leaves a token to be sampled."""
    check_count(name, value)
    if value < SHORTEST_GENERATED:
        raise OptionError(
            f"{name}={_shown(value)}: expected at least {SHORTEST_GENERATED}: one random token, the next "
            f"{SHORTEST_GENERATED - 2} greedily, and one that is sampled"
        )


def check_optional_count(name: str, value: Any) -> None:
    """Raise an `OptionError` unless the value is None or an integer of at least 1."""
    if value is not None:
        check_count(name, value)


def check_integer(name: str, value: Any) -> None:
    """Raise an `OptionError` unless the value is an integer that a random generator takes as its seed."""
    if not _is_number(value, Integral) or abs(int(value)) > LARGEST_SEED:
        raise OptionError(f"{name}={_shown(value)}: expected a whole number of at most 62 bits")


def check_flag(name: str, value: Any) -> None:
    """Raise an `OptionError` unless the value is True or False, of Python or of NumPy."""
    if type(value).__name__ not in ("bool", "bool_"):
        raise OptionError(f"{name}={value!r}: expected True or False")


def check_text(name: str, value: Any) -> None:
    """Raise an `OptionError` unless the value is a text that is not empty."""
    if not isinstance(value, str) or not value:
        raise OptionError(f"{name}={value!r}: expected a text, got a {type(value).__name__}")


def check_optional_text(name: str, value: Any) -> None:
    """Raise an `OptionError` unless the value is None or a text."""
    if value is not None:
        check_text(name, value)


def check_optional_path(name: str, value: Any) -> None:
    """Raise an `OptionError` unless the value is None or names a folder."""
    if value is not None and not isinstance(value, PathLike):
        check_text(name, value)


def check_rate(name: str, value: Any) -> None:
    """Raise an `OptionError` unless the value is a learning rate: a number above 0 and at most 1."""
    if not _is_number(value, Real) or not 0 < value <= 1:
        raise OptionError(f"{name}={_shown(value)}: expected a learning rate, above 0 and at most 1")


def check_part(name: str, value: Any) -> None:
    """Raise an `OptionError` unless the value is a share from 0 to 1."""
    if not _is_number(value, Real) or not 0 <= value <= 1:
        raise OptionError(f"{name}={_shown(value)}: expected a share from 0 to 1")


def check_granularity(name: str, value: Any) -> None:
    """Raise an `OptionError` unless the value names a granularity or is a number of blocks."""
    if _is_number(value, Integral):
        check_count(name, value)
    elif not isinstance(value, str) or value not in GRANULARITIES:
        expected = f"one of {', '.join(map(repr, GRANULARITIES))}, or a number of blocks"
        raise OptionError(f"{name}={_shown(value)}: expected {expected}")


def check_ridge(name: str, value: Any) -> None:
    """Raise an `OptionError` unless the value is "auto" or a number from 0 to `LARGEST_RIDGE`."""
    automatic = isinstance(value, str) and value == "auto"
    if not automatic and (not _is_number(value, Real) or not 0 <= value <= LARGEST_RIDGE):
        expected = f'"auto" or a number >= 0, at most {LARGEST_RIDGE:g} (relative to the mean diagonal of the Gram)'
        raise OptionError(f"{name}={_shown(value)}: expected {expected}")


def check_optional_ridge(name: str, value: Any) -> None:
    """Raise an `OptionError` unless the value is None or a number from 0 to `LARGEST_RIDGE`."""
    if value is not None and (not _is_number(value, Real) or not 0 <= value <= LARGEST_RIDGE):
        expected = f"None or a number >= 0, at most {LARGEST_RIDGE:g} (relative to the mean diagonal of the Gram)"
        raise OptionError(f"{name}={_shown(value)}: expected {expected}")


def check_sparsity(name: str, value: Any) -> None:
    """Raise an `OptionError` unless the value is a share above 0 and below 1, or a pattern such as "2:4"."""
    if isinstance(value, str):
        kept, _, group = value.partition(":")
        if kept.isdecimal() and group.isdecimal() and 0 < int(kept) < int(group) <= LARGEST_GROUP:
            return
    elif _is_number(value, Real) and 0 < value < 1:
        return
    raise OptionError(
        f"{name}={_shown(value)}: expected the share of weights that is removed, above 0 and below 1, or a pattern such as "
        f'"2:4" (2 of 4 neighbouring inputs stay; groups of at most {LARGEST_GROUP})'
    )


def check_quality(name: str, value: Any) -> None:
    """Raise an `OptionError` unless the value is "auto" or an integer from 0 to `LARGEST_COUNT`."""
    automatic = isinstance(value, str) and value == "auto"
    if not automatic and (not _is_number(value, Integral) or not 0 <= int(value) <= LARGEST_COUNT):
        raise OptionError(
            f'{name}={_shown(value)}: expected "auto" or a number of sequences, from 0 (none) to {LARGEST_COUNT:,}'
        )


def _check_activations(name: str, value: Any) -> None:
    if value is not None:
        check_choice(name, value, PLACES)


def _check_budget(name: str, value: Any) -> None:
    # `Costs`, which cannot be imported here, or their content in a run.json.
    if not isinstance(value, Mapping) and not hasattr(type(value), "unit_costs"):
        check_choice(name, value, BUDGETS)


def is_iterable(value: Any) -> bool:
    """Whether a loop can go over a value; of an array without dimensions its class says so, wrongly."""
    try:
        iter(value)
    except TypeError:
        return False
    return True


def check_list(name: str, value: Any, of: str = "names") -> None:
    """Raise an `OptionError` if a text was given in place of a list of texts: its letters would be taken one by one."""
    # An iterator would be used up by the time it is needed.
    if isinstance(value, (str, bytes)) or not is_iterable(value) or iter(value) is value:
        raise OptionError(f"{name}={value!r}: expected a list of {of}, got a {type(value).__name__}")


def _check_names(name: str, value: Any) -> None:
    check_list(name, value, of="names of sites and numbers of layers")
    for each in value:
        if not isinstance(each, str) and not _is_number(each, Integral):
            raise OptionError(f"{name}: expected names of sites and numbers of layers, got {each!r}")


# The criteria of the library; `liar.selection.register_criterion` adds to them.
CRITERIA: dict[str, str] = {
    "reconstruction": "change of the output when the unit is removed and the rest reconstructed",
    "fluctuation": "variance of the unit's activations times the weights that read them (FLAP)",
    "wanda": "absolute weights times the norm of their input (Wanda)",
    "taylor": "change of the loss to first order, from gradients",
    "fisher": "squared gradients, summed over sequences",
    "snip": "absolute weights times their gradients",
    "magnitude": "root mean square of the weights; needs no data",
    "random": "uniform scores; needs no data",
}
WEIGHT_CRITERIA: dict[str, str] = {
    "magnitude": "absolute weights, compared within a layer; needs no data",
    "wanda": "absolute weights times the norm of their input, compared within an output (Wanda)",
    "sparsegpt": "what the layer's output loses, column by column, with an update of the columns that follow (SparseGPT)",
}
BUDGETS: dict[str, str] = {
    "params": "parameters in the transformer blocks",
    "flops": "matrix products in the blocks for sequences of 128 tokens",
    "latency": "measured time of the whole model for one sequence of 128 tokens",
}
WIDTHS: dict[str, str] = {
    "free": "all units compete for one budget; layers differ in width",
    "balanced": "every layer keeps the same share, as nearly as the budget allows",
    "uniform": "the same widths in every layer, and only those that the stock class can load",
}
HEADS: dict[str, str] = {
    "group": "a key and value head with its query heads",
    "query": "a single query head, equally many of every group; all key and value heads stay",
}
TARGETS: dict[str, str] = {
    "residual_stream": "the dense model's residual stream after the layer, on the pruned model's own activations",
    "layer_output": "the layer's own output, on the dense model's activations (our reading of LIAR)",
}
SOLVERS: dict[str, str] = {
    "auto": "Cholesky, and an eigendecomposition where it fails",
    "cholesky": "the same",
    "eigh": "eigendecomposition of the Gram matrix",
    "lstsq": "torch.linalg.lstsq on a streamed R factor: slower, for badly conditioned layers",
}
BIASES: dict[str, str] = {
    "preserve": "a bias is refitted where the layer has one",
    "create": "layers without a bias get one; stock classes may then be unable to load the model",
}
GRANULARITIES: dict[str, str] = {
    "matrix": "every matrix by itself, to the teacher's output of it",
    "sublayer": "attention and feed-forward part of every block separately, each to the teacher's residual stream after it",
    "block": "block by block, to the teacher's output of the block",
}
PROPAGATIONS: dict[str, str] = {
    "global": "windows read the model's own activations and are fitted to those of the teacher's own pass",
    "pruned": "windows read the model's own activations and are fitted to what the teacher's window makes of the same ones",
    "dense": "windows read the teacher's activations and are fitted to what the teacher makes of them",
}
ACTIVATIONS: dict[str, str] = {
    "device": "where they are computed",
    "host": "in pinned memory of the host; on a CPU the same as device",
    "disk": "in files of the run folder, or of a temporary one",
    "auto": "the first of these that fits in the memory that is free",
}
PLACES: dict[str, str] = {name: meaning for name, meaning in ACTIVATIONS.items() if name != "auto"}
WEIGHTS: dict[str, str] = {
    "device": "on the device, all of them",
    "host": "in host memory; one block at a time is on the device",
    "disk": "in the files of the model; one block at a time is in memory",
}
DTYPES: dict[str, str] = {
    "auto": "as stored",
    "float32": "32 bits",
    "bfloat16": "16 bits, the range of float32",
    "float16": "16 bits, a small range",
}


Group = TypeVar("Group", bound="OptionGroup")


class OptionGroup:
    """Base of the classes below: frozen dataclasses whose fields are made by `_option`."""

    def check(self) -> None:
        """Raise an `OptionError` that names the first bad value."""
        for each, option in options_in(type(self)):
            option.validate(each.name, getattr(self, each.name))

    def checked(self: Group) -> Group:
        """The same options after `check`, with Python's numbers in place of NumPy's, which overflow."""
        self.check()
        own = {each.name: getattr(self, each.name) for each, _ in options_in(type(self))}
        plain = {name: value.item() for name, value in own.items() if isinstance(value, np.generic)}
        plain |= {name: float(value) for name, value in own.items() if isinstance(value, Fraction)}
        return replace(self, **plain)  # type: ignore[type-var]


@dataclass(frozen=True)
class CalibrationOptions(OptionGroup):
    """How texts become batches; see `liar.calibration`."""

    max_length: int = _option("Tokens per sequence.", default=256, check=check_count)
    batch_size: int = _option("Sequences per batch.", default=32, check=check_count)
    tokens: int | None = _option("Calibration tokens; all texts if not given.", default=None, check=check_optional_count)
    pack: bool = _option(
        "Join the texts and cut full sequences, as language models are trained.", default=False, check=check_flag
    )
    mixed_lengths: bool = _option("Split an encoder's long texts into pieces of mixed lengths.", default=True, check=check_flag)


@dataclass(frozen=True)
class SelectOptions(OptionGroup):
    """Which units stay; see `liar.select`."""

    keep: float = _option("Share to keep of what the budget counts, above 0 and at most 1.", check=check_share)
    criterion: str = _option("What makes a head or neuron worth keeping.", default="reconstruction", choices=CRITERIA)
    budget: Any = _option("What the share is counted in.", default="params", choices=BUDGETS, check=_check_budget)
    widths: str = _option("How widths may differ between layers.", default="free", choices=WIDTHS)
    round_to: int = _option("Kept channels of a layer are a multiple of this number, or all.", default=1, check=check_count)
    protect: Sequence[str | int] = _option(
        "Sites (heads.0) and layers (by number) that are not cut.", default=(), check=_check_names
    )
    seed: int = _option("For the random criterion.", default=0, check=check_integer)
    heads: str = _option("What is removed as one unit where query heads share keys and values.", default="group", choices=HEADS)


@dataclass(frozen=True)
class ReconstructOptions(OptionGroup):
    """How the rest is repaired; see `liar.reconstruct`."""

    target: str = _option("What the kept channels are fitted to.", default="residual_stream", choices=TARGETS)
    ridge: float | str = _option(
        "Pull toward the kept weights: auto (chosen per site on held-out text), or a number relative to the mean diagonal of "
        "the Gram matrix.",
        default="auto",
        check=check_ridge,
    )
    drift_ridge: float | None = _option(
        "A ridge of its own for what the pruned stream has lost before a layer; the same for all if not given.",
        default=None,
        check=check_optional_ridge,
    )
    refit: bool = _option("First fit the layers before the kept units to their dense output.", default=True, check=check_flag)
    solver: str = _option("How the least squares are solved.", default="auto", choices=SOLVERS)
    bias: str = _option("What happens to biases.", default="preserve", choices=BIASES)
    quality: int | str = _option(
        "Sequences on which the finished model's output is compared with the dense model's: a number, 0 for no comparison, or "
        "auto (so few that it costs little, at most 16).",
        default="auto",
        check=check_quality,
    )
    set_aside: bool = _option(
        "Take these sequences out of the calibration data first, so that nothing is fitted to what is compared.",
        default=False,
        check=check_flag,
    )

    def check(self) -> None:
        """Raise an `OptionError` that names the first bad value, or options that exclude each other."""
        super().check()
        if self.drift_ridge is not None and self.target != "residual_stream":
            raise OptionError(
                f"drift_ridge={self.drift_ridge!r} needs target='residual_stream': with target={self.target!r} no layer makes "
                "up for what is lost before it"
            )


@dataclass(frozen=True)
class UnstructuredOptions(OptionGroup):
    """Which single weights are removed; see `liar.unstructured.prune`."""

    sparsity: float | str = _option(
        "Share of the weights that is removed from every layer, or a pattern: 2:4 keeps 2 of 4 neighbouring inputs.",
        default=0.5,
        check=check_sparsity,
    )
    criterion: str = _option("What makes a single weight worth keeping.", default="wanda", choices=WEIGHT_CRITERIA)


@dataclass(frozen=True)
class GenerateOptions(OptionGroup):
    """How a model writes calibration texts; see `liar.self_generate`."""

    tokens: int = _option("Tokens to generate, at least; the last text is not cut.", check=check_count)
    max_length: int = _option("Tokens per text, at most.", default=256, check=check_generated_length)
    batch_size: int = _option("Texts that are generated at a time.", default=32, check=check_count)
    language: str = _option(
        "Texts that are kept: any (in some natural language), the code of one (en, de, …), or off (all texts).",
        default="any",
        check=check_text,
    )
    seed: int = _option("For the tokens that are drawn.", default=0, check=check_integer)


@dataclass(frozen=True)
class PlanOptions(OptionGroup):
    """What a run is planned for; see `liar.plan`."""

    tokens: int = _option("Calibration tokens.", check=check_count)
    max_length: int = _option("Tokens per sequence.", default=256, check=check_count)
    batch_size: int = _option("Sequences per batch.", default=32, check=check_count)
    activations: str | None = _option(
        "Where streams, targets and replayed outputs are kept; all three side by side if not given.",
        default=None,
        choices=PLACES,
        check=_check_activations,
    )
    offload: bool = _option("Weights come to the device one block at a time.", default=False, check=check_flag)
    measure: bool = _option("Time a second of products on the device, to estimate seconds.", default=True, check=check_flag)


@dataclass(frozen=True)
class TeacherOptions(OptionGroup):
    """Where the command line finds the dense model that the repair is fitted to, where it is not MODEL itself."""

    teacher: str | None = _option(
        "Dense model, a folder or a name on the hub, whose activations the repair is fitted to.",
        default=None,
        check=check_optional_text,
    )


@dataclass(frozen=True)
class PruneOptions(OptionGroup):
    """How `liar.prune` gets to the share that stays."""

    steps: int = _option(
        "Prune and repair in so many steps of equal ratio, measuring anew after each; always fitted to the dense model.",
        default=1,
        check=check_count,
    )


@dataclass(frozen=True)
class RunOptions(OptionGroup):
    """Where a run keeps what it computes."""

    activations: str = _option("Where activations of all calibration tokens are kept.", default="device", choices=ACTIVATIONS)
    run_folder: str | PathLike[str] | None = _option(
        "Folder for finished blocks: a run that was killed goes on from there when it is called again.",
        default=None,
        check=check_optional_path,
    )


@dataclass(frozen=True)
class RefineOptions(OptionGroup):
    """How kept weights are trained on the teacher's activations; see `liar.refine`."""

    granularity: int | str = _option(
        "What is trained together, or a number: windows of so many blocks, of which neighbours share one.",
        default="sublayer",
        choices=GRANULARITIES,
        check=check_granularity,
    )
    propagation: str = _option("What windows read and what they are fitted to.", default="global", choices=PROPAGATIONS)
    epochs: int = _option("Passes over the calibration data, for every window.", default=10, check=check_count)
    sequences: int = _option("Sequences per step of the optimizer.", default=8, check=check_count)
    learning_rate: float = _option("Largest learning rate; it falls linearly to zero.", default=2e-4, check=check_rate)
    warmup: float = _option("Share of the steps in which the learning rate rises first.", default=0.0, check=check_part)
    patience: int = _option(
        "Passes without a smaller error on held-out sequences after which a window ends.", default=2, check=check_count
    )
    lora: int | None = _option(
        "Rank of low-rank updates (LoRA, by peft), merged at the end; all weights are trained if not given.",
        default=None,
        check=check_optional_count,
    )
    seed: int = _option("Of the order of the batches, and of the first low-rank updates.", default=0, check=check_integer)


@dataclass(frozen=True)
class SourceOptions(OptionGroup):
    """Where the command line finds calibration texts."""

    calib: str = _option(
        "Texts: a .txt file (a text per line), .jsonl[.gz], .csv, .parquet, or the name of a dataset.", check=check_text
    )
    config: str | None = _option("Configuration of the dataset.", default=None, check=check_optional_text)
    split: str = _option("Split of the dataset.", default="train", check=check_text)
    column: str = _option("Column that holds the texts.", default="text", check=check_text)


@dataclass(frozen=True)
class LoadOptions(OptionGroup):
    """How the command line loads a model."""

    dtype: str = _option("Type of the weights.", default="auto", choices=DTYPES)
    device: str = _option("Where to run: cpu, cuda, …", default="cpu", check=check_text)
    weights: str = _option("Where the weights are while they are not needed.", default="device", choices=WEIGHTS)


@dataclass(frozen=True)
class SaveOptions(OptionGroup):
    """How the command line saves a model."""

    standalone: bool = _option(
        "Write the code that builds a model of unequal layers too: it then loads without this library.",
        default=False,
        check=check_flag,
    )


def option_of(each: Field[Any]) -> Option:
    """What is known of the option in a field of one of the classes above."""
    option: Option = each.metadata["option"]
    return option


def options_in(*groups: type) -> Iterator[tuple[Field[Any], Option]]:
    """The options of some classes, in order."""
    for group in groups:
        for each in fields(group):
            yield each, option_of(each)


def options_table(*groups: type) -> str:
    """A Markdown table of options, for the docs."""
    rows = ["| option | default | meaning |", "| --- | --- | --- |"]
    for each, option in options_in(*groups):
        default = "required" if each.default is MISSING else f"`{each.default!r}`"
        choices = "".join(f"<br>`{value}`: {meaning}" for value, meaning in (option.choices or {}).items())
        rows.append(f"| `{each.name}` | {default} | {option.help}{choices} |")
    return "\n".join(rows)
