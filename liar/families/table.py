"""What a family of models has to say about itself: names of layers, nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from liar.sites import Kind


@dataclass(frozen=True)
class SitePattern:
    """Where the units of one kind live inside a transformer block; all names are relative to the block.

    Attributes:
        kind: `"heads"` or `"neurons"`.
        producers: linear layers whose output channels belong to the units. The last one has the fewest channels
            per unit (the value projection where key and value heads are shared).
        consumer: linear layer that reads the units.
        residual: module and positional argument of its forward that hold the residual stream which the consumer's
            output is added to.
        mixer: module that computes what the consumer reads, and does nothing else but perhaps call the consumer; its output
            is then replayed where the block has to run again. Left out, it runs again. Attention without heads gets a stand-in
            there, which is given the hidden states first or as `hidden_states` and returns two things, the second None.
        unit_width: attribute path of the number of channels of one unit in the last producer (the size of a head);
            None where a unit is one channel.
        counts: attribute paths of integers in proportion to the number of units (wrong after slimming if not corrected).
        sizes: keys of the configuration in proportion to the number of units.

    Example:
        >>> neurons = SitePattern("neurons", ("intermediate.dense",), "output.dense", residual=("output", 1))
        >>> neurons.unit_width is None
        True
    """

    kind: Kind
    producers: tuple[str, ...]
    consumer: str
    residual: tuple[str, int]
    mixer: str | None = None
    unit_width: str | None = None
    counts: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """A table of module names for every model with one `config.model_type`.

    Attributes:
        model_type: as in the model's Hugging Face configuration.
        blocks: the `nn.ModuleList` of transformer blocks, relative to the bare model (`model.base_model`).
        patterns: the sites of one block, in the order in which data passes them.
        note: one line for people, shown by `liar families`.

    Example:
        >>> [pattern.kind for pattern in liar.families.family_of(model).patterns]
        ['heads', 'neurons']
    """

    model_type: str
    blocks: str
    patterns: tuple[SitePattern, ...]
    note: str = ""
