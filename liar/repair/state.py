"""The state of a walk: what all blocks share, one block beside its pruned copy, one site under repair."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field

from torch import Tensor, nn

from liar.data import FOLDS, Calibration, sample_tokens
from liar.mask import Mask
from liar.models import LayerView, Layout, Site, layer_of
from liar.progress import timed
from liar.repair.captures import Capture, capture_points, read_captures
from liar.runtime import ActivationStore, BlockCall, calls_of, capture_activations, distributed, replay_output, run_block
from liar.statistics import TokenIndex

# The two streams in the store.
DENSE, PRUNED = "dense", "pruned"


@dataclass
class BlockPair:
    """A dense block beside its pruned copy (None where nothing is cut), and the sublayers that need not run again.

    Attributes:
        sites: of the pruned block, in the order of the data.
        dense_sites: of the dense block, which may be another model's.
        returns: by site, how many values its sublayer returns as a tuple (None: one value by itself).
        replayed: sites whose sublayer replays what it gave.
        finished: (site, batch) of which that is kept; of others, what the consumer reads.
    """

    number: int
    dense: nn.Module
    pruned: nn.Module | None
    sites: tuple[Site, ...]
    dense_sites: tuple[Site, ...]
    returns: dict[str, int | None] = field(default_factory=dict)
    replayed: list[Site] = field(default_factory=list)
    finished: set[tuple[str, int]] = field(default_factory=set)


@dataclass(frozen=True)
class Sample:
    """Some of the tokens that a stack reads.

    Attributes:
        tokens: by batch, which positions they are at, sorted by fold.
        origins: by fold, how many of them earlier processes have.
    """

    tokens: Sequence[TokenIndex]
    origins: Sequence[int]


@dataclass
class Walk:
    """What all blocks of a walk share.

    Attributes:
        layout: sites of the model that is cut.
        calibration: the batches.
        mask: None where nothing is cut: only the dense model is walked.
        store: both streams, how blocks are called, and what the steps keep.
        clock: seconds by stage.
        has_pruned_stream: False where the steps look at the dense stream only.
        has_teacher: whether the dense stream is another model's.
        drifted: whether the pruned stream differs from the dense one by now.
        samples: by stack and share, the tokens that were asked for.
    """

    layout: Layout
    calibration: Calibration
    mask: Mask | None
    store: ActivationStore
    clock: defaultdict[str, float]
    has_pruned_stream: bool
    has_teacher: bool
    drifted: bool = field(init=False)
    samples: dict[tuple[int, float], Sample] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.drifted = self.has_teacher
        for stack in range(len(self.layout.stacks)):
            self.sample(stack)

    @property
    def batches(self) -> range:
        """Numbers of the batches."""
        return range(len(self.calibration.batches))

    def sample(self, stack: int, share: float = 1) -> Sample:
        """The real tokens that a stack reads, or about such a share of them; all processes ask for one at the same time."""
        key = stack, min(share, 1)
        if key not in self.samples:
            tokens = [self._sampled(stack, batch, share) for batch in self.batches]
            own = [sum(sizes) for sizes in zip(*(index.sizes for index in tokens), strict=True)] or [0] * FOLDS
            earlier = distributed.gather(own)[: distributed.rank()]
            self.samples[key] = Sample(tokens, [sum(counts) for counts in zip(*earlier, strict=True)] or [0] * FOLDS)
        return self.samples[key]

    def _sampled(self, stack: int, batch: int, share: float) -> TokenIndex:
        calibration = self.calibration.of_stack(stack)
        mask, fold = calibration.token_masks[batch], calibration.folds[batch]
        part = sample_tokens(calibration, batch, share)
        return TokenIndex.of(part, fold[part[mask]], FOLDS)

    def arguments(self, stream: str, block: int, batch: int) -> tuple[Tensor, BlockCall]:
        """What a block is run on: the hidden states of a stream, and the rest of the call."""
        return self.store.get(stream, batch), self.store.get(calls_of(stream, block), batch)

    def replays(self, block: BlockPair, batch: int) -> ExitStack:
        """A context in which the sublayers of repaired sites return what they give with their repaired consumers."""
        stack = ExitStack()
        for site in block.replayed:
            assert block.pruned is not None
            assert site.sublayer is not None
            series = f"{site.name} replay"
            value = self.store.get(series, batch)
            if site.consumer.module.startswith(f"{site.sublayer}.") and (site.name, batch) not in block.finished:
                value = block.pruned.get_submodule(site.consumer.module)(value)
                # In a parallel block, sites after it read what its consumer gives: it has to run.
                if not any(other.added_before for other in block.sites):
                    self.store.put(series, batch, value)
                    block.finished.add((site.name, batch))
            length = block.returns[site.name]
            output = value if length is None else (value, *[None] * (length - 1))
            stack.enter_context(replay_output(block.pruned.get_submodule(site.sublayer), output))
        return stack

    def timed(self, stage: str) -> AbstractContextManager[None]:
        """Add the time of the body to the clock."""
        return timed(self.clock, stage)


@dataclass
class SiteState:
    """One site under repair: what a step reads, runs and changes.

    Attributes:
        walk: what all blocks share.
        block: the dense block and its pruned copy.
        site: of the pruned block.
        dense_site: of the dense block.

    Example:
        A step that halves the output of every site that is cut.

        >>> from liar.repair import RepairStep, apply_steps
        >>> class Halve(RepairStep):
        ...     def repair(self, site):
        ...         weight, bias = site.consumer.initial_weights()
        ...         site.consumer.write(weight / 2, bias / 2)
        ...         print(site.name, int(site.unit_mask.sum()), site.drifted)
        >>> layout, batches = liar.discover(model), liar.Calibration.of(calib, model)
        >>> apply_steps(model, layout, batches, [Halve()], liar.Mask.of({"neurons.0": range(32)}, layout))
        neurons.0 32 False
        heads.1 4 True
        neurons.1 64 True
    """

    walk: Walk
    block: BlockPair
    site: Site
    dense_site: Site

    @property
    def name(self) -> str:
        """The site's name."""
        return self.site.name

    @property
    def calibration(self) -> Calibration:
        """The batches, with the tokens that the site sees."""
        return self.walk.calibration.of_stack(self.site.stack)

    def tokens(self, batch: int, share: float = 1) -> TokenIndex:
        """The real tokens of a batch, or about such a share of them, by fold."""
        return self.walk.sample(self.site.stack, share).tokens[batch]

    @property
    def unit_mask(self) -> Tensor:
        """Bool [units]: True for the units that stay."""
        assert self.walk.mask is not None
        return self.walk.mask[self.name]

    @property
    def keeps_all(self) -> bool:
        """Whether nothing of the site is removed."""
        return bool(self.unit_mask.all())

    @property
    def drifted(self) -> bool:
        """Whether the pruned stream that reaches the site differs from the dense one."""
        return self.walk.drifted

    @property
    def pruned_block(self) -> nn.Module:
        """The pruned copy of the block, with modules of its own."""
        assert self.block.pruned is not None, "a walk without a mask has no pruned blocks"
        return self.block.pruned

    @property
    def consumer(self) -> LayerView:
        """The consumer in the pruned block."""
        return layer_of(self.pruned_block, self.site.consumer)

    @property
    def dense_consumer(self) -> LayerView:
        """The consumer in the dense block."""
        return layer_of(self.block.dense, self.dense_site.consumer)

    @property
    def producers(self) -> list[LayerView]:
        """The layers in the pruned block that the units come from, cut with them or not."""
        return [LayerView.of(self.pruned_block.get_submodule(name), name) for name in self.site.inputs]

    def put(self, series: str, batch: int, value: Tensor) -> None:
        """Keep a value of this site for later."""
        self.walk.store.put(f"{self.name} {series}", batch, value)

    def get(self, series: str, batch: int) -> Tensor:
        """A value that was put."""
        value: Tensor = self.walk.store.get(f"{self.name} {series}", batch)
        return value

    def discard(self, series: str) -> None:
        """Drop all values of a series of this site."""
        self.walk.store.discard(f"{self.name} {series}")

    def run_pruned(self, *captures: Capture) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Run the pruned block on every batch as far as needed: (batch, [sequences, length, channels] by capture)."""
        for batch in self.walk.batches:
            yield batch, self.run_batch(batch, *captures)

    def run_batch(self, batch: int, *captures: Capture) -> dict[str, Tensor]:
        """`run_pruned` for one batch."""
        assert self.walk.has_pruned_stream, "a walk without a pruned stream does not run pruned blocks"
        points = capture_points(self.pruned_block, self.site, captures)
        with (
            self.walk.timed("pruned forward"),
            capture_activations(points, stop=True) as activations,
            self.walk.replays(self.block, batch),
        ):
            run_block(self.pruned_block, *self.walk.arguments(PRUNED, self.block.number, batch))
        return read_captures(activations, self.pruned_block, self.site, captures, self.calibration.token_masks[batch])

    def run_block(self, batch: int) -> None:
        """Run the whole pruned block on a batch, for a step that has hooks of its own."""
        with self.walk.timed("pruned forward"), self.walk.replays(self.block, batch):
            run_block(self.pruned_block, *self.walk.arguments(PRUNED, self.block.number, batch))

    def keep_for_replay(self, batch: int, consumer_input: Tensor) -> None:
        """Note what the consumer read, so that the site's sublayer need not run again while later sites are repaired.

        Only right if the producers do not change afterwards. The consumer may, until the site is done.
        """
        if self.site.sublayer is not None:
            self.put("replay", batch, consumer_input)
