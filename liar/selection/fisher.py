"""How much an error in the residual stream moves the model's output: the Fisher information of the stream, without labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from liar.data import Calibration
from liar.errors import at_site
from liar.models import Layout, layer_of
from liar.runtime import Point, record_gradients, sequence_sums
from liar.selection.gradients import differentiable, gradients, run_with_gradients
from liar.selection.loss import sampled_label_loss
from liar.statistics import check_finite


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


def sensitivities(model: nn.Module, layout: Layout, calibration: Calibration, progress: bool) -> dict[str, Sensitivity]:
    """The sensitivity at every site, by site name, from one pass forward and back.

    Without a head, the output is the mean of the last hidden states over each sequence, relative to its size.

    Args:
        model: with its task head, if it has one.
        layout: its sites.
        calibration: batches; labels are not looked at.
        progress: show a bar.

    Raises:
        CalibrationError: NaN or Inf at a site, which it names.
        ModelError: parameters that gradients cannot be taken of.
    """
    consumers = {site.name: layer_of(model.get_submodule(site.block), site.consumer) for site in layout.sites}
    points = {name: Point(consumer.module, None) for name, consumer in consumers.items()}
    # The user may be in inference mode, whose tensors cannot be added to outside of it.
    with torch.inference_mode(False):
        sums = {name: GradientMoments(consumer.matrix.new_zeros(consumer.size("out"))) for name, consumer in consumers.items()}
    # Gradients flow down to the first block: its consumers make all that comes after them differentiable.
    first = [consumers[site.name].weight for site in layout.of_block(layout.sites[0].block)]
    bar = tqdm(total=calibration.tokens, desc="sensitivity", unit="tok", unit_scale=True, disable=not progress)
    with record_gradients(model, first), bar:
        ordinary, outputs = differentiable(calibration), 0
        for number, token_mask in enumerate(ordinary.token_masks):
            activations, predicted = run_with_gradients(model, layout, ordinary, number, points)
            loss = sampled_label_loss(predicted, token_mask, ordinary.starts[number])
            stream_gradients = gradients(loss, [activations[name] for name in sums])
            for part, gradient in zip(sums.values(), stream_gradients, strict=True):
                part.update(gradient[token_mask].float(), token_mask)
            outputs += len(predicted[0].rows)
            bar.update(int(token_mask.sum()))
    # From the last site to the first, as gradients flow: the one named is where NaN began.
    for site in reversed(layout.sites):
        with at_site(site.name, site.module):
            check_finite(sums[site.name].squares, what="gradients")
    return {name: Sensitivity(part.squares / outputs, part.coherence(), outputs) for name, part in sums.items()}


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

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later."""
        return {"squares": self.squares.clone(), "together": self.together}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the content by what `state_dict` gave."""
        self.squares, self.together = state["squares"].clone(), state["together"]

    def coherence(self) -> float:
        """See `Sensitivity`; 1 where all gradients are zero."""
        alone = float(self.squares.trace())
        return self.together / alone if alone > 0 else 1.0
