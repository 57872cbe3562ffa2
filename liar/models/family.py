"""What a family of models has to say about itself: names of layers and the order of a block, nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from liar.errors import ModelError
from liar.models.layout import HeadArgument, Kind


@dataclass(frozen=True)
class FusedProducer:
    """A layer that computes several producers at once, as equal blocks of output channels side by side.

    A layer that interleaves them unit by unit is an ordinary producer: the channels of a unit then lie together.

    Attributes:
        module: name of the layer, relative to the block.
        parts: number of blocks (3 for query, key and value).

    Example:
        >>> from liar.models.tables.gpt2 import GPT2
        >>> GPT2.patterns[0].producers
        (FusedProducer(module='attn.c_attn', parts=3),)
    """

    module: str
    parts: int


@dataclass(frozen=True)
class SitePattern:
    """Where the units of one kind are inside a transformer block; all names are relative to the block.

    Attributes:
        kind: `"heads"` or `"neurons"`.
        producers: layers whose output channels belong to the units: names, or `FusedProducer`.
        consumer: layer that reads the units; units are counted on its input channels.
        residual: module and positional argument of its forward that hold the residual stream which the consumer's
            output is added to.
        sublayer: module that computes what the consumer reads, and does nothing else but perhaps call the consumer; its output
            is then replayed where the block has to run again. Left out, it runs again.
        unit_width: attribute path of the size of a head; None where a unit is one channel.
        group_size: attribute path of the query heads that share one key/value head; None where none are shared.
        size_attributes: attribute paths of integers in proportion to the number of units (corrected when the model is cut).
        config_keys: keys of the configuration in proportion to the number of units.
        output_scale: attribute path of a number, or of a parameter with one for each channel, by which the consumer's output
            is multiplied before it is added to the residual stream.
        output_norm: module that normalises the consumer's output before it is added to the residual stream.
        unit_parameters: paths of further parameters whose first dimension is in proportion to the number of units.
        head_argument: an argument of the attention with an entry for each head.

    Example:
        >>> neurons = SitePattern("neurons", ("intermediate.dense",), "output.dense", residual=("output", 1))
        >>> neurons.unit_width is None
        True
    """

    kind: Kind
    producers: tuple[str | FusedProducer, ...]
    consumer: str
    residual: tuple[str, int]
    sublayer: str | None = None
    unit_width: str | None = None
    group_size: str | None = None
    size_attributes: tuple[str, ...] = ()
    config_keys: tuple[str, ...] = ()
    output_scale: str | None = None
    output_norm: str | None = None
    unit_parameters: tuple[str, ...] = ()
    head_argument: HeadArgument | None = None

    def __post_init__(self) -> None:
        """Find what Python would take silently: a kind nothing knows, a name in place of a tuple of names.

        Raises:
            ModelError: which entry is wrong, and what it should be.
        """
        if self.kind not in get_args(Kind):
            raise ModelError(f"kind={self.kind!r}: expected one of {', '.join(map(repr, get_args(Kind)))}")
        for name in ("producers", "size_attributes", "config_keys", "unit_parameters"):
            if not isinstance(value := getattr(self, name), tuple):
                raise ModelError(f"{name}={value!r}: expected a tuple of names, got a {type(value).__name__}")
        if not isinstance(self.residual, tuple) or len(self.residual) != 2:
            raise ModelError(f"residual={self.residual!r}: expected (module, index of a positional argument of its forward)")
        if self.output_scale is not None and self.output_norm is not None:
            raise ModelError(f"{self.kind}: expected output_scale or output_norm, got both")


@dataclass(frozen=True)
class Stack:
    """A stack of transformer blocks that reads what the one before it gives: the decoder of a model with encoder and decoder.

    Attributes:
        blocks: as in `Family`.
        patterns: as in `Family`.

    Example:
        >>> from liar.models.tables.t5 import T5
        >>> [stack.blocks for stack in T5.stacks]
        ['encoder.block', 'decoder.block']
    """

    blocks: str
    patterns: tuple[SitePattern, ...]

    def __post_init__(self) -> None:
        """Find a pattern in place of a tuple of patterns.

        Raises:
            ModelError: it is no tuple of patterns.
        """
        if not isinstance(self.patterns, tuple) or not all(isinstance(each, SitePattern) for each in self.patterns):
            raise ModelError(f"patterns of {self.blocks!r}: expected a tuple of SitePattern, got {self.patterns!r}")

    def of_kind(self, kind: str) -> SitePattern:
        """The pattern of a kind."""
        return next(pattern for pattern in self.patterns if pattern.kind == kind)


@dataclass(frozen=True)
class Family:
    """A table of module names for every model with one `config.model_type`.

    Attributes:
        model_type: as in the model's Hugging Face configuration.
        blocks: the `nn.ModuleList` of transformer blocks, relative to the bare model (`model.base_model`).
        patterns: the sites of one block, in the order in which data passes them.
        decoder: the second stack of blocks, where the first is an encoder whose output it reads. Layers are counted through:
            the first of the decoder comes after the last of the encoder.
        is_pre_norm: True if a block outputs its last residual sum as it is and the next reader normalises it (LLaMA, GPT-2);
            False if a block normalises its sums itself (BERT).
        is_parallel: True if attention and feed-forward part read the same residual stream and are added to it together
            (GPT-J); False if the feed-forward part reads the sum with the attention. The name of an entry of the configuration
            where that says it (GPT-NeoX).
        requires: entries of the configuration with the value that the table is made for, where another would build blocks that
            it does not describe; a model without that entry is taken.
        otherwise: the table for models of this type that `requires` does not take.
        note: one line for people, shown by `liar families`.

    Example:
        >>> {"bert", "gpt2", "llama"} <= {family.model_type for family in liar.families()}
        True
    """

    model_type: str
    blocks: str
    patterns: tuple[SitePattern, ...]
    is_pre_norm: bool
    is_parallel: bool | str = False
    requires: tuple[tuple[str, Any], ...] = ()
    otherwise: Family | None = None
    decoder: Stack | None = None
    note: str = ""

    def __post_init__(self) -> None:
        """Find a pattern in place of a tuple of patterns.

        Raises:
            ModelError: it is no tuple of patterns, or empty.
        """
        if not isinstance(self.patterns, tuple) or not all(isinstance(each, SitePattern) for each in self.patterns):
            raise ModelError(f"patterns of {self.model_type!r}: expected a tuple of SitePattern, got {self.patterns!r}")

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The stacks of blocks, in the order in which data passes them."""
        first = Stack(self.blocks, self.patterns)
        return (first,) if self.decoder is None else (first, self.decoder)

    def fitting(self, config: Any) -> Family:
        """This table, or that of `otherwise` which takes a configuration where this one does not."""
        takes = all(getattr(config, name, value) == value for name, value in self.requires)
        other = None if takes or self.otherwise is None else self.otherwise.fitting(config)
        return self if other is None else other
