"""How much an error in the residual stream moves the model's output: the Fisher information of the stream, without labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from liar.batches import Calibration
from liar.capture import Point
from liar.errors import at_site
from liar.gradients import SEED, STRIDE, differentiable, gradients, look
from liar.loss import drawn
from liar.sites import Layout, linear
from liar.statistics.normal import check_finite
from liar.streams import by_sequence


@dataclass(frozen=True)
class Sensitivity:
    """What errors in the stream after a site do to the model's output.

    With g the gradient at a token of the log-likelihood of a label drawn from the model's own prediction:

    Attributes:
        fisher: the sum over tokens of `g g'`, per output of the model: float32 [out, out]. If every token has an error e of its
            own, the output moves by `e' fisher e / 2` in Kullback-Leibler divergence, on average and to second order: the
            expected squared gradient of such draws is the Fisher information (Kunstner et al. 2019, section 2). Beside the
            Gram matrix of the inputs it is the other factor of K-FAC (Martens and Grosse 2015, section 3).
        coherence: how many times as much it moves if all tokens of a sequence have the same error: squares of the sums of g
            over each sequence, over the squares of g. 1 where tokens pull in directions of their own, up to the number of
            tokens where the output is their mean. (K-FAC's two ways with shared weights: Eschenhagen et al. 2023, section 3.)
        outputs: of how many outputs that is known: sequences, or tokens where each has its own.
    """

    fisher: Tensor
    coherence: float
    outputs: int


def sensitivities(model: nn.Module, layout: Layout, calibration: Calibration, progress: bool) -> dict[str, Sensitivity]:
    """The sensitivity at every site, by site name, from one pass forward and back.

    Where there is no head, the output is the mean of the last hidden states over each sequence, relative to its size.

    Args:
        model: with its task head, if it has one.
        layout: its sites.
        calibration: batches; labels are not looked at.
        progress: show a bar.

    Raises:
        CalibrationError: NaN or Inf at a site, which it names.
        ModelError: parameters that gradients cannot be taken of.
    """
    consumers = {site.name: linear(model.get_submodule(site.block), site.consumer) for site in layout.sites}
    points = {name: Point(consumer, None) for name, consumer in consumers.items()}
    found = {name: _Sums(consumer.weight) for name, consumer in consumers.items()}
    # Gradients flow down to the first site: its consumer makes all that comes after it differentiable.
    first = consumers[layout.sites[0].name].weight
    bar = tqdm(total=calibration.tokens, desc="sensitivity", unit="tok", unit_scale=True, disable=not progress)
    with differentiable(model, calibration, [first]) as ordinary, bar:
        outputs = 0
        for number, keep in enumerate(ordinary.keep):
            seen, said = look(model, layout, ordinary, number, points)
            slopes = gradients(drawn(said, SEED + STRIDE * number), [seen[name] for name in found])
            for part, slope in zip(found.values(), slopes, strict=True):
                part.update(slope[keep].float(), keep)
            outputs += len(said[0].rows)
            bar.update(int(keep.sum()))
    # As in `unit_gradients`: the one named is where NaN began.
    for site in reversed(layout.sites):
        with at_site(site.name, site.module):
            check_finite(found[site.name].squares, what="gradients")
    return {name: Sensitivity(part.squares / outputs, part.coherence(), outputs) for name, part in found.items()}


class _Sums:
    """Running sums over the data at one site: products of gradients, and squares of their sums over sequences."""

    def __init__(self, weight: Tensor) -> None:
        self.squares = weight.new_zeros(len(weight), len(weight), dtype=torch.float32)
        self.together = 0.0

    def update(self, slope: Tensor, keep: Tensor) -> None:
        """Add the gradients of a batch, float32 [tokens, out], and where they belong, bool [sequences, length]."""
        self.squares.addmm_(slope.T, slope)
        self.together += float(by_sequence(slope, keep).square().sum(dtype=torch.float64))

    def coherence(self) -> float:
        """See `Sensitivity`; 1 where no gradient is known."""
        alone = float(self.squares.trace())
        return self.together / alone if alone > 0 else 1.0
