"""Every option once: its default, its possible values, its check and its help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from liar.options.checks import (
    check_activations,
    check_budget,
    check_count,
    check_flag,
    check_generated_length,
    check_granularity,
    check_integer,
    check_names,
    check_optional_count,
    check_optional_path,
    check_optional_text,
    check_part,
    check_quality,
    check_rate,
    check_ridge,
    check_share,
    check_sparsity,
    check_text,
)
from liar.options.choices import (
    ACTIVATIONS,
    BIASES,
    BUDGETS,
    CRITERIA,
    DTYPES,
    GRANULARITIES,
    HEADS,
    PLACES,
    PROPAGATIONS,
    SOLVERS,
    TARGETS,
    WEIGHT_CRITERIA,
    WEIGHTS,
    WIDTHS,
)
from liar.options.option import OptionGroup, option


@dataclass(frozen=True)
class CalibrationOptions(OptionGroup):
    """How texts become batches; see `liar.calibration`."""

    max_length: int = option("Tokens per sequence.", default=256, check=check_count)
    batch_size: int = option("Sequences per batch.", default=32, check=check_count)
    tokens: int | None = option("Calibration tokens; all texts if not given.", default=None, check=check_optional_count)
    pack: bool = option(
        "Join the texts and cut full sequences, as language models are trained.", default=False, check=check_flag
    )
    mixed_lengths: bool = option("Split an encoder's long texts into pieces of mixed lengths.", default=True, check=check_flag)


@dataclass(frozen=True)
class SelectOptions(OptionGroup):
    """Which units stay; see `liar.select`."""

    keep: float = option("Share to keep of what the budget counts, above 0 and at most 1.", check=check_share)
    criterion: str = option("What makes a head or neuron worth keeping.", default="reconstruction", choices=CRITERIA)
    budget: Any = option("What the share is counted in.", default="params", choices=BUDGETS, check=check_budget)
    widths: str = option("How widths may differ between layers.", default="free", choices=WIDTHS)
    round_to: int = option("Kept channels of a layer are a multiple of this number, or all.", default=1, check=check_count)
    protect: Sequence[str | int] = option(
        "Sites (heads.0) and layers (by number) that are not cut.", default=(), check=check_names
    )
    seed: int = option("For the random criterion.", default=0, check=check_integer)
    heads: str = option("What is removed as one unit where query heads share keys and values.", default="group", choices=HEADS)


@dataclass(frozen=True)
class ReconstructOptions(OptionGroup):
    """How the rest is repaired; see `liar.reconstruct`."""

    target: str = option("What the kept channels are fitted to.", default="damped_stream", choices=TARGETS)
    ridge: float | str = option(
        "Pull toward the kept weights: auto (chosen per site on held-out text), or a number relative to the mean diagonal of "
        "the Gram matrix.",
        default="auto",
        check=check_ridge,
    )
    refit: bool = option("First fit the layers before the kept units to their dense output.", default=True, check=check_flag)
    solver: str = option("How the least squares are solved.", default="auto", choices=SOLVERS)
    bias: str = option("What happens to biases.", default="preserve", choices=BIASES)
    quality: int | str = option(
        "Sequences on which the finished model's output is compared with the dense model's: a number, 0 for no comparison, or "
        "auto (so few that it costs little, at most 16).",
        default="auto",
        check=check_quality,
    )
    set_aside: bool = option(
        "Take these sequences out of the calibration data first, so that nothing is fitted to what is compared.",
        default=False,
        check=check_flag,
    )

    @property
    def on_stream(self) -> bool:
        """Whether layers are fitted one after the other, on the stream of the pruned model."""
        return self.target != "layer_output"


@dataclass(frozen=True)
class UnstructuredOptions(OptionGroup):
    """Which single weights are removed; see `liar.unstructured.prune`."""

    sparsity: float | str = option(
        "Share of the weights that is removed from every layer, or a pattern: 2:4 keeps 2 of 4 neighbouring inputs.",
        default=0.5,
        check=check_sparsity,
    )
    criterion: str = option("What makes a single weight worth keeping.", default="wanda", choices=WEIGHT_CRITERIA)


@dataclass(frozen=True)
class GenerateOptions(OptionGroup):
    """How a model writes calibration texts; see `liar.self_generate`."""

    tokens: int = option("Tokens to generate, at least; the last text is not cut.", check=check_count)
    max_length: int = option("Tokens per text, at most.", default=256, check=check_generated_length)
    batch_size: int = option("Texts that are generated at a time.", default=32, check=check_count)
    language: str = option(
        "Texts that are kept: any (in some natural language), the code of one (en, de, …), or off (all texts).",
        default="any",
        check=check_text,
    )
    seed: int = option("For the tokens that are drawn.", default=0, check=check_integer)


@dataclass(frozen=True)
class PlanOptions(OptionGroup):
    """What a run is planned for; see `liar.plan`."""

    tokens: int = option("Calibration tokens.", check=check_count)
    max_length: int = option("Tokens per sequence.", default=256, check=check_count)
    batch_size: int = option("Sequences per batch.", default=32, check=check_count)
    activations: str | None = option(
        "Where streams, targets and replayed outputs are kept; all three side by side if not given.",
        default=None,
        choices=PLACES,
        check=check_activations,
    )
    offload: bool = option("Weights come to the device one block at a time.", default=False, check=check_flag)
    measure: bool = option("Time a second of products on the device, to estimate seconds.", default=True, check=check_flag)


@dataclass(frozen=True)
class TeacherOptions(OptionGroup):
    """Where the command line finds the dense model that the repair is fitted to, where it is not MODEL itself."""

    teacher: str | None = option(
        "Dense model, a folder or a name on the hub, whose activations the repair is fitted to.",
        default=None,
        check=check_optional_text,
    )


@dataclass(frozen=True)
class PruneOptions(OptionGroup):
    """How `liar.prune` gets to the share that stays."""

    steps: int = option(
        "Prune and repair in so many steps of equal ratio, measuring anew after each; always fitted to the dense model.",
        default=1,
        check=check_count,
    )


@dataclass(frozen=True)
class RunOptions(OptionGroup):
    """Where a run keeps what it computes."""

    activations: str = option("Where activations of all calibration tokens are kept.", default="device", choices=ACTIVATIONS)
    run_folder: str | PathLike[str] | None = option(
        "Folder for finished blocks: a run that was killed goes on from there when it is called again.",
        default=None,
        check=check_optional_path,
    )


@dataclass(frozen=True)
class RefineOptions(OptionGroup):
    """How kept weights are trained on the teacher's activations; see `liar.refine`."""

    granularity: int | str = option(
        "What is trained together, or a number: windows of so many blocks, of which neighbours share one.",
        default="sublayer",
        choices=GRANULARITIES,
        check=check_granularity,
    )
    propagation: str = option("What windows read and what they are fitted to.", default="global", choices=PROPAGATIONS)
    epochs: int = option("Passes over the calibration data, for every window.", default=10, check=check_count)
    sequences: int = option("Sequences per step of the optimizer.", default=8, check=check_count)
    learning_rate: float = option("Largest learning rate; it falls linearly to zero.", default=2e-4, check=check_rate)
    warmup: float = option("Share of the steps in which the learning rate rises first.", default=0.0, check=check_part)
    patience: int = option(
        "Passes without a smaller error on held-out sequences after which a window ends.", default=2, check=check_count
    )
    lora: int | None = option(
        "Rank of low-rank updates (LoRA, by peft), merged at the end; all weights are trained if not given.",
        default=None,
        check=check_optional_count,
    )
    seed: int = option("Of the order of the batches, and of the first low-rank updates.", default=0, check=check_integer)


@dataclass(frozen=True)
class SourceOptions(OptionGroup):
    """Where the command line finds calibration texts."""

    calib: str = option(
        "Texts: a .txt file (a text per line), .jsonl[.gz], .csv, .parquet, or the name of a dataset.", check=check_text
    )
    config: str | None = option("Configuration of the dataset.", default=None, check=check_optional_text)
    split: str = option("Split of the dataset.", default="train", check=check_text)
    column: str = option("Column that holds the texts.", default="text", check=check_text)


@dataclass(frozen=True)
class LoadOptions(OptionGroup):
    """How the command line loads a model."""

    dtype: str = option("Type of the weights.", default="auto", choices=DTYPES)
    device: str = option("Where to run: cpu, cuda, …", default="cpu", check=check_text)
    weights: str = option("Where the weights are while they are not needed.", default="device", choices=WEIGHTS)


@dataclass(frozen=True)
class SaveOptions(OptionGroup):
    """How the command line saves a model."""

    standalone: bool = option(
        "Write the code that builds a model of unequal layers too: it then loads without this library.",
        default=False,
        check=check_flag,
    )
