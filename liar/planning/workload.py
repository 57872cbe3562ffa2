"""What a run works on, in numbers: tokens, the sizes of every site, and what one pass over a batch holds and computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from liar.data import Calibration
from liar.errors import OptionError
from liar.models import base_and_prefix


@dataclass(frozen=True)
class Data:
    """How much data there is.

    Attributes:
        tokens: real tokens.
        positions: with padding.
        sequences: so many.
        batch: the largest batch, on the meta device.
        batch_positions: of that batch.
        batch_sequences: likewise.
        length: of the longest sequence.
    """

    tokens: int
    positions: int
    sequences: int
    batch: Mapping[str, Any]
    batch_positions: int
    batch_sequences: int
    length: int

    @property
    def batches(self) -> float:
        """How many times the largest batch all data is."""
        return self.positions / self.batch_positions

    @classmethod
    def of_count(cls, model: nn.Module, tokens: int, *, length: int, batch_size: int) -> Data:
        """Full sequences of text, as a language model is calibrated.

        Raises:
            OptionError: the model reads no text.
        """
        if getattr(model, "main_input_name", "input_ids") != "input_ids":
            raise OptionError(f"{type(model).__name__} reads no text: give calibration batches in place of a number of tokens")
        length = min(length, tokens)
        sequences = -(-tokens // length)
        together = min(batch_size, sequences)
        ids = torch.empty(together, length, dtype=torch.int64, device="meta")
        batch = {"input_ids": ids}
        accepted = signature(base_and_prefix(model)[0].forward).parameters
        if "decoder_input_ids" in accepted:
            batch["decoder_input_ids"] = ids
        extra = {"use_cache": False} if "use_cache" in accepted else {}
        return cls(tokens, sequences * length, sequences, {**batch, **extra}, together * length, together, length)

    @classmethod
    def of_calibration(cls, calibration: Calibration) -> Data:
        """What a user has."""
        masks = calibration.token_masks
        largest = max(range(len(masks)), key=lambda number: masks[number].numel())
        batch = {
            name: value.to("meta") if isinstance(value, Tensor) else value
            for name, value in calibration.batches[largest].items()
            # Without padding models leave the mask out themselves.
            if not (name == "attention_mask" and bool(masks[largest].all()))
        }
        return cls(
            tokens=calibration.tokens,
            positions=sum(mask.numel() for mask in masks),
            sequences=calibration.sequences,
            batch=batch,
            batch_positions=masks[largest].numel(),
            batch_sequences=len(masks[largest]),
            length=max(mask.shape[1] for mask in masks),
        )


@dataclass(frozen=True)
class SiteSize:
    """One site in numbers.

    Attributes:
        kind: `"heads"` or `"neurons"`.
        channels: that the consumer reads.
        kept: of them, if all sites keep the same share.
        widest: of them where widths are free, and one site may keep more than another.
        out: what it gives.
        fed: input channels of the producers.
        produced: output channels of the layers that the units come from, after the cut.
        weights: parameters of the site's layers that go away with units.
        is_normed: whether a norm comes between the consumer and the residual stream.
        can_replay: whether its sublayer need not run again.
    """

    kind: str
    channels: int
    kept: int
    widest: int
    out: int
    fed: int
    produced: int
    weights: int
    is_normed: bool
    can_replay: bool

    @property
    def share(self) -> float:
        """Of the channels that stay."""
        return self.kept / self.channels


@dataclass(frozen=True)
class BlockSize:
    """One block in numbers: its sites, and one pass of the dense block over the largest batch.

    Attributes:
        sites: in the order of the data.
        nbytes: of its parameters.
        element: bytes of a number in its stream.
        flops: products of matrices.
        traffic: bytes that other operations move.
        peak: bytes beside weights and what enters.
    """

    sites: tuple[SiteSize, ...]
    nbytes: int
    element: int
    flops: float
    traffic: float
    peak: int

    @property
    def share(self) -> float:
        """Of its products that stay, about."""
        channels = sum(site.channels * site.out for site in self.sites)
        return sum(site.kept * site.out for site in self.sites) / max(channels, 1)


@dataclass(frozen=True)
class Gradients:
    """The pass forward and back by which the output's sensitivity is measured.

    Attributes:
        tokens: that are read, in all passes.
        passes: so many.
        forward: products of matrices of one.
        backward: likewise.
        traffic: bytes that other operations move.
        peak: bytes beside the weights.
        entries: of the peak, what enters the blocks, where that is kept until they run again.
    """

    tokens: float
    passes: float
    forward: float
    backward: float
    traffic: float
    peak: int
    entries: int


@dataclass(frozen=True)
class Workload:
    """A model and its data.

    Attributes:
        data: how much there is.
        blocks: in order.
        pre_norm: whether a block outputs its last residual sum as it is.
        nbytes: of all parameters and buffers.
        largest_at_once: of a block, or of what is used by itself outside of the blocks, such as embeddings.
        calls: bytes of the arguments that blocks get beside the stream, of one batch.
        head_flops: products of what comes before and after the blocks, for one batch.
        classes: of an output by token; 0 without.
        can_leave_out: whether the model can compute the outputs of some positions only.
        gradients: of the selection.
    """

    data: Data
    blocks: tuple[BlockSize, ...]
    pre_norm: bool
    nbytes: int
    largest_at_once: int
    calls: int
    head_flops: float
    classes: int
    can_leave_out: bool
    gradients: Gradients

    @property
    def sites(self) -> Sequence[SiteSize]:
        """Of all blocks."""
        return [site for block in self.blocks for site in block.sites]
