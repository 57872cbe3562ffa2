"""The loss that gradients are taken of: of the user's labels, or of labels sampled from the model's own predictions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, nll_loss

from liar.data import IGNORED
from liar.errors import CalibrationError
from liar.runtime import Output

# Keeps the relative noise of a sequence whose hidden states are zero finite.
SMALL = 1e-6
# Classes from which a label is sampled by inverting the distribution function.
MANY_CLASSES = 4_096
# The outputs of one sequence sample with seeds STRIDE * its global number + 0, 1, …
STRIDE = 16


def label_loss(outputs: Sequence[Output], token_mask: Tensor, labels: Tensor, *, causal: bool) -> Tensor:
    """Negative log-likelihood of labels, summed over tokens and sequences: a scalar.

    Of a number, which is the mean of a Gaussian of variance 1, half the squared error.

    Args:
        outputs: the model's one output.
        token_mask: bool [sequences, length]: True for real tokens.
        labels: [sequences] or, for an output by token, [sequences, length]; -100 does not count.
        causal: a token's row says what the next token is.

    Raises:
        CalibrationError: labels that do not fit the output.
    """
    output = outputs[0]
    labels = _fitting(outputs, token_mask, labels)
    if causal and output.by_token:
        # Neither a first token nor padding is predicted.
        following = token_mask.roll(-1, 1)
        following[:, -1] = False
        labels = labels.roll(-1, 1).where(following, IGNORED)
    labels = labels[token_mask] if output.by_token else labels
    if output.kind == "classes":
        return nll_loss(output.rows, labels.long(), ignore_index=IGNORED, reduction="sum")
    if output.kind == "labels":
        return binary_cross_entropy_with_logits(output.rows, labels.to(output.rows), reduction="sum")
    return (output.rows.squeeze(-1) - labels).square().sum() / 2


def _fitting(outputs: Sequence[Output], token_mask: Tensor, labels: Tensor) -> Tensor:
    """The labels, [sequences] or [sequences, length], if they are what the output asks for."""
    output = outputs[0]
    if [other.name for other in outputs] != ["logits"]:
        raise CalibrationError(
            f"labels are compared with `logits`, the model gives {' and '.join(other.name for other in outputs)}: "
            "leave them out"
        )
    shape = token_mask.shape if output.by_token else token_mask.shape[:1]
    labels = labels.squeeze(-1) if labels.shape == (*shape, 1) else labels
    if output.kind == "labels":
        shape = output.rows.shape
    if labels.shape != shape or (output.kind == "classes" and labels.is_floating_point()):
        kind = {"classes": "integer labels", "labels": "0 or 1 for every label", "numbers": "numbers as labels"}[output.kind]
        raise CalibrationError(
            f"expected {kind} of shape {list(shape)} for logits of shape {list(output.rows.shape)}, got {labels.dtype} of "
            f"shape {list(labels.shape)}"
        )
    classes = output.rows.shape[-1]
    if output.kind == "labels" and not bool(((labels == 0) | (labels == 1)).all()):
        raise CalibrationError("expected 0 or 1 for every label of multi-label classification, got other labels")
    if output.kind == "classes" and not bool(((labels == IGNORED) | ((labels >= 0) & (labels < classes))).all()):
        raise CalibrationError(
            f"expected labels from 0 to {classes} - 1, or {IGNORED} for those that do not count, got labels from "
            f"{int(labels.min())} to {int(labels.max())}"
        )
    return labels


def sampled_label_loss(outputs: Sequence[Output], token_mask: Tensor, first_sequence: int) -> Tensor:
    """Negative log-likelihood of labels sampled from the model's own predictive distribution, summed: a scalar.

    Then the expected squared gradient is the Fisher information itself (Kunstner et al. 2019, section 2: the true Fisher,
    not the empirical one). The model's own probabilities as soft labels would not do: their cross entropy is at its least,
    so every gradient of a sequence is zero. Nor would the most likely labels: where the model is sure, their loss hardly has
    a gradient, and elsewhere only one class of many is asked about.

    Every sequence samples with seeds of its own, from its global number, so its labels do not depend on the sequences it is
    batched with, nor on the process that has it.

    Args:
        outputs: the model's outputs.
        token_mask: bool [sequences, length]: True for real tokens.
        first_sequence: global number of the batch's first sequence.
    """
    lengths = token_mask.sum(1).tolist()
    losses = []
    for number, output in enumerate(outputs):
        sizes = lengths if output.by_token else [1] * len(lengths)
        seeds = [STRIDE * (first_sequence + sequence) + number for sequence in range(len(lengths))]
        losses.append(_sampled_loss(output, sizes, seeds))
    return torch.stack(losses).sum()


def _sampled_class(log_probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """A class for every row of [rows, classes]: int64 [rows]."""
    chances = log_probabilities.exp()
    if chances.shape[-1] < MANY_CLASSES:
        return torch.multinomial(chances, 1, generator=generator).squeeze(-1)
    # multinomial draws a number for every class; one for every row is enough.
    below = chances.cumsum(-1)
    level = torch.rand(len(chances), 1, generator=generator, device=chances.device, dtype=chances.dtype) * below[:, -1:]
    return torch.searchsorted(below, level, right=True).squeeze(-1).clamp_max(chances.shape[-1] - 1)


def _sampled_loss(output: Output, sizes: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """The loss of one output; `sizes` rows of each sequence, and its seed (samples repeat on the same device)."""
    rows = output.rows
    if not len(rows):
        return rows.sum()  # only padding
    pairs = [(part, seed) for part, seed in zip(torch.split(rows.detach(), list(sizes)), seeds, strict=True) if len(part)]
    generators = [torch.Generator(rows.device).manual_seed(seed) for _, seed in pairs]
    if output.kind == "labels":
        chances = [(part.sigmoid(), each) for (part, _), each in zip(pairs, generators, strict=True)]
        present = torch.cat([torch.bernoulli(chance, generator=each) for chance, each in chances])
        return binary_cross_entropy_with_logits(rows, present, reduction="sum")
    if output.kind == "classes":
        sampled = [_sampled_class(part, each) for (part, _), each in zip(pairs, generators, strict=True)]
        return nll_loss(rows, torch.cat(sampled), reduction="sum")
    # A number y ~ N(output, 1): the gradient of (output - y)^2 / 2 is a standard normal number times that of the output.
    noise = torch.cat(
        [
            torch.randn(part.shape, generator=each, device=rows.device, dtype=rows.dtype)
            for (part, _), each in zip(pairs, generators, strict=True)
        ]
    )
    if output.name == "hidden":
        # Hidden states have no unit of their own; relative to its size, every sequence counts alike.
        noise = noise / rows.detach().square().mean(-1, keepdim=True).sqrt().clamp_min(SMALL)
    return (noise * rows).sum()
