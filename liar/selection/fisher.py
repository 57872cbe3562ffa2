"""How much an error in the residual stream moves the model's output: the Fisher information of the stream, without labels."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from liar.data import Calibration, sample, split, take
from liar.errors import at_site
from liar.models import Layout, compute_device, is_offloaded, layer_of
from liar.progress import Progress, timed
from liar.runtime import (
    Point,
    by_sequence,
    distributed,
    drawn,
    outputs_of,
    preserve_model_state,
    recompute_blocks,
    record_gradients,
    sequence_sums,
)
from liar.selection.gradients import differentiable, gradients, run_with_gradients
from liar.selection.loss import sampled_label_loss
from liar.statistics import Collectives, check_finite

# A sample of the data is enough, since what it estimates is a mean over outputs (benchmarks/README.md, "What a sample of the
# calibration data decides"): of so many tokens where each has an output of its own ...
OUTPUTS = 4_096
# ... but not of a few long texts only. Where sequences have one output each, of so many of these, and of so many tokens.
TEXTS = 8
SEQUENCES = 1_024
TOKENS = 16_384
# Numbers in the logits of one pass.
LOGITS = 2**26


@dataclass(frozen=True)
class Sensitivity:
    """What errors in the stream after a site do to the model's output.

    With g the gradient at a token of the log-likelihood of a label sampled from the model's own prediction:

    Attributes:
        fisher: the sum over tokens of `g g'`, per output of the model: float32 [out, out]. If every token has an error e of its
            own, the output moves by `e' fisher e / 2` in Kullback-Leibler divergence, on average and to second order: the
            expected squared gradient of such samples is the Fisher information (Kunstner et al. 2019, section 2). Beside the
            Gram matrix of the inputs it is the other factor of K-FAC (Martens and Grosse 2015, section 3).
        coherence: how many times as much it moves if all tokens of a sequence have the same error: squares of the sums of g
            over each sequence, over the squares of g. 1 where tokens pull in directions of their own, up to the number of
            tokens where the output is their mean. (K-FAC's two ways with shared weights: Eschenhagen et al. 2023, section 3.)
        outputs: number of outputs that were sampled: sequences, or tokens where each has its own.
    """

    fisher: Tensor
    coherence: float
    outputs: int


def sensitivities(model: nn.Module, layout: Layout, calibration: Calibration, progress: Progress) -> dict[str, Sensitivity]:
    """The sensitivity at every site, by site name, from one pass forward and back over a sample of the data.

    Without a head, the output is the mean of the last hidden states over each sequence, relative to its size.

    Args:
        model: with its task head, if it has one.
        layout: its sites.
        calibration: batches; labels are not looked at.
        progress: of the run; the stage is "sensitivity".

    Raises:
        CalibrationError: NaN or Inf at a site, which it names.
        ModelError: parameters that gradients cannot be taken of.
    """
    consumers = {site.name: layer_of(model.get_submodule(site.block), site.consumer) for site in layout.sites}
    points = {name: Point(consumer.module, None) for name, consumer in consumers.items()}
    # The user may be in inference mode, whose tensors cannot be added to outside of it.
    with torch.inference_mode(False):
        sums = {site.name: GradientMoments(torch.zeros(site.out, device=compute_device(model))) for site in layout.sites}
    # Gradients flow down to the first block of a stack: its consumers make all that comes after them differentiable.
    first = [consumers[site.name].weight for stack in layout.stacks for site in layout.of_block(stack[0])]
    calibration, every = sampled(model, calibration)
    calibration = distributed.share(calibration, model)
    passes = ExitStack()
    if is_offloaded(model):
        first = []
        passes.enter_context(recompute_blocks([model.get_submodule(name) for name in layout.blocks]))
    with passes, record_gradients(model, first), progress.stage("sensitivity", calibration.own_tokens) as advance:
        ordinary, outputs = differentiable(calibration), 0
        for number, token_mask in enumerate(ordinary.token_masks):
            with timed(progress.seconds, "select: forward"):
                activations, predicted = run_with_gradients(model, layout, ordinary, number, points, every=every)
            with timed(progress.seconds, "select: backward"):
                loss = sampled_label_loss(predicted, drawn(token_mask, every), ordinary.starts[number])
                stream_gradients = gradients(loss, [activations[name] for name in sums])
            with timed(progress.seconds, "select: sums of gradients"):
                for site, gradient in zip(layout.sites, stream_gradients, strict=True):
                    tokens = ordinary.of_stack(site.stack).token_masks[number]
                    sums[site.name].update(by_sequence(gradient, tokens)[tokens].float(), tokens)
            outputs += len(predicted[0].rows)
            advance(int(token_mask.sum()))
    outputs = sum(distributed.gather(outputs))
    for part in sums.values():
        part.reduce(distributed)
    # From the last site to the first, as gradients flow: the one named is where NaN began.
    for site in reversed(layout.sites):
        with at_site(site.name, site.module):
            check_finite(sums[site.name].squares, what="gradients")
    # One after the other, since the sums of all sites are as large as some models.
    return {name: sums.pop(name).result(outputs) for name in list(sums)}


def sampled(model: nn.Module, calibration: Calibration) -> tuple[Calibration, int]:
    """The sequences to sample labels for, in batches whose logits fit in memory; and every which position of them."""
    with preserve_model_state(model):
        outputs = outputs_of(model, take(calibration, [(0, torch.zeros(1, dtype=torch.int64))]), 0)
    by_token = [output.rows.shape[-1] for output in outputs if output.by_token]
    if not by_token:
        return sample(calibration, TOKENS, sequences=SEQUENCES), 1
    part = sample(calibration, OUTPUTS, sequences=TEXTS)
    thinned = "logits_to_keep" in signature(model.forward).parameters
    every = max(part.tokens // OUTPUTS, 1) if thinned else 1
    longest = max(mask.shape[1] for mask in part.token_masks)
    return split(part, max(LOGITS * every // (longest * max(by_token)), 1)), every


class GradientMoments:
    """Running sums over the data at one site: products of gradients, and squares of their sums over sequences.

    Args:
        like: [out], a tensor of the device on which the sums are kept.
    """

    def __init__(self, like: Tensor) -> None:
        self.squares = like.new_zeros(len(like), len(like), dtype=torch.float32)
        self.together = 0.0

    def update(self, gradient: Tensor, token_mask: Tensor) -> None:
        """Add the gradients of a batch, float32 [tokens, out], and where they belong, bool [sequences, length]."""
        self.squares.addmm_(gradient.T, gradient)
        self.together += float(sequence_sums(gradient, token_mask).square().sum(dtype=torch.float64))

    def merge(self, other: GradientMoments) -> None:
        """Add another's gradients. `other` keeps its content."""
        self.squares += other.squares
        self.together += other.together

    def reduce(self, processes: Collectives) -> None:
        """Add the gradients of all processes."""
        processes.add(self.squares)
        self.together = sum(processes.gather(self.together))

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later."""
        return {"squares": self.squares.clone(), "together": self.together}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the content by what `state_dict` gave."""
        self.squares, self.together = state["squares"].clone(), state["together"]

    def result(self, outputs: int) -> Sensitivity:
        """The sensitivity, per output."""
        return Sensitivity(self.squares / outputs, self.coherence(), outputs)

    def coherence(self) -> float:
        """See `Sensitivity`; 1 where all gradients are zero."""
        alone = float(self.squares.trace())
        return self.together / alone if alone > 0 else 1.0
