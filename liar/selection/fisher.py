"""How much an error in the residual stream moves the model's output: the Fisher information of the stream, without labels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from liar.data import Calibration, sample, split, take
from liar.errors import at_site
from liar.models import Layout, compute_device, is_offloaded, layer_of
from liar.progress import Progress, timed
from liar.runtime import (
    ActivationStore,
    Point,
    by_sequence,
    distributed,
    drawn,
    outputs_of,
    preserve_model_state,
    receive_activations,
    recompute_blocks,
    record_gradients,
    sequence_sums,
)
from liar.selection.gradients import check_outputs, differentiable
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


class Sensitivities(Mapping[str, Sensitivity]):
    """Sensitivities by site; their matrices are in a store, since those of all sites are as large as some models.

    Args:
        store: of nothing else.
    """

    def __init__(self, store: ActivationStore) -> None:
        self._store = store

    def __setitem__(self, site: str, sensitivity: Sensitivity) -> None:
        self._store.put(site, 0, (sensitivity.fisher, sensitivity.coherence, sensitivity.outputs))

    def __getitem__(self, site: str) -> Sensitivity:
        return Sensitivity(*self._store.get(site, 0))

    def __iter__(self) -> Iterator[str]:
        return iter(self._store.names())

    def __len__(self) -> int:
        return len(self._store.names())


def sensitivities(
    model: nn.Module, layout: Layout, calibration: Calibration, progress: Progress, store: ActivationStore | None = None
) -> Sensitivities:
    """The sensitivity at every site, by site name, from one pass forward and back over a sample of the data.

    Without a head, the output is the mean of the last hidden states over each sequence, relative to its size. Gradients are
    added to the sums of their site as soon as they are there, and sums are in the store in between: nothing is held of several
    sites but what autograd needs for the way back, and of an offloaded model not even that.

    Args:
        model: with its task head, if it has one.
        layout: its sites.
        calibration: batches; labels are not looked at.
        progress: of the run; the stage is "sensitivity".
        store: of what is kept meanwhile, and of the result; where it is computed, if left out.

    Raises:
        CalibrationError: NaN or Inf at a site, which it names.
        ModelError: parameters that gradients cannot be taken of.
    """
    store = ActivationStore() if store is None else store
    consumers = {site.name: layer_of(model.get_submodule(site.block), site.consumer) for site in layout.sites}
    # The user may be in inference mode, whose tensors cannot be added to outside of it.
    with torch.inference_mode(False):
        sums = {site.name: GradientMoments(torch.zeros(site.out, device=compute_device(model)), store) for site in layout.sites}
    # Gradients flow down to the first block of a stack: its consumers make all that comes after them differentiable.
    weights = [consumers[site.name].weight for site in layout.first_sites]
    calibration, every = sampled(model, calibration)
    calibration = distributed.share(calibration, model)
    passes = ExitStack()
    if is_offloaded(model):
        weights = []
        passes.enter_context(recompute_blocks([model.get_submodule(name) for name in layout.blocks], store))
    with passes, record_gradients(model, weights), progress.stage("sensitivity", calibration.own_tokens) as advance:
        ordinary, outputs = differentiable(calibration), 0
        for number, token_mask in enumerate(ordinary.token_masks):
            outputs += _run_batch(model, layout, ordinary, number, every, sums, progress.seconds)
            advance(int(token_mask.sum()))
    outputs = sum(distributed.gather(outputs))
    found = Sensitivities(store)
    # From the last site to the first, as gradients flow: the one named is where NaN began.
    for site in reversed(layout.sites):
        own = sums.pop(site.name)
        own.reduce(distributed)
        with at_site(site.name, site.module):
            check_finite(own.squares, what="gradients")
        found[site.name] = own.result(outputs)
    return found


def _run_batch(
    model: nn.Module,
    layout: Layout,
    calibration: Calibration,
    number: int,
    every: int,
    sums: Mapping[str, GradientMoments],
    seconds: defaultdict[str, float],
) -> int:
    """Run a batch forward and back, and add the gradients of what consumers give to their sums; the number of its outputs.

    Args:
        model: to run.
        layout: its sites.
        calibration: batches.
        number: which of them.
        every: see `sampled`.
        sums: by site.
        seconds: by kind of work, are added to.
    """
    points = {site.name: Point(model.get_submodule(site.module), None) for site in layout.sites}
    first = {site.name for site in layout.first_sites}
    ends: list[GradientEdge] = []
    work = "select: sums of gradients"

    def add(name: str, gradient: Tensor) -> None:
        tokens = calibration.of_stack(layout[name].stack).token_masks[number]
        with timed(seconds, work):
            sums[name].update(by_sequence(gradient, tokens)[tokens].float(), tokens)

    def receive(name: str, value: Tensor) -> None:
        with at_site(name, layout[name].module):
            check_finite(value.detach())
        value.register_hook(partial(add, name))  # type: ignore[no-untyped-call]
        if name in first:
            # Of the value as it is now: a block may add to it in place.
            ends.append(get_gradient_edge(value))

    with timed(seconds, "select: forward"), receive_activations(points, receive):
        outputs = outputs_of(model, calibration, number, every=every)
    check_outputs(model, outputs)
    before = seconds[work]
    with timed(seconds, "select: backward"):
        positions = drawn(calibration.token_masks[number], every)
        loss = sampled_label_loss(outputs, positions, calibration.starts[number])
        torch.autograd.grad(loss, ends, allow_unused=True)
    seconds["select: backward"] -= seconds[work] - before
    return len(outputs[0].rows)


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
        like: [out], a tensor of the device on which sums are computed.
        store: of the sums between updates; they stay where they are, if left out.
    """

    def __init__(self, like: Tensor, store: ActivationStore | None = None) -> None:
        self._store = ActivationStore() if store is None else store
        self._kept = self._store.keep(like.new_zeros(len(like), len(like), dtype=torch.float32))
        self.together = 0.0

    @property
    def squares(self) -> Tensor:
        """The sum of products, [out, out]; not to be changed in place, since it may be kept elsewhere."""
        return self._store.fetch(self._kept)

    @squares.setter
    def squares(self, value: Tensor) -> None:
        self._kept = self._store.keep(value)

    def update(self, gradient: Tensor, token_mask: Tensor) -> None:
        """Add the gradients of a batch, float32 [tokens, out], and where they belong, bool [sequences, length]."""
        self.squares = torch.addmm(self.squares, gradient.T, gradient)
        self.together += float(sequence_sums(gradient, token_mask).square().sum(dtype=torch.float64))

    def merge(self, other: GradientMoments) -> None:
        """Add another's gradients. `other` keeps its content."""
        self.squares = self.squares + other.squares
        self.together += other.together

    def reduce(self, processes: Collectives) -> None:
        """Add the gradients of all processes."""
        squares = self.squares.clone()  # collectives change a tensor unseen
        processes.add(squares)
        self.squares = squares
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
