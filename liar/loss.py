"""The loss that gradients are taken of: of the user's labels, or of labels drawn from what the model itself says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import nll_loss

from liar.errors import CalibrationError
from liar.outputs import Output

# As in transformers: a label that does not count.
IGNORED = -100
# Keeps the relative noise of a sequence of which the model says nothing finite.
SMALL = 1e-6


def labelled(said: Sequence[Output], keep: Tensor, labels: Tensor, *, causal: bool) -> Tensor:
    """Negative log-likelihood of labels, summed over tokens and sequences: a scalar.

    Of a number, which is the mean of a Gaussian of variance 1, half the squared error.

    Args:
        said: the model's one output.
        keep: bool [sequences, length]: True for real tokens.
        labels: [sequences] or, for an output by token, [sequences, length]; -100 does not count.
        causal: a token's row says what the next token is.

    Raises:
        CalibrationError: labels that do not fit the output.
    """
    output = said[0]
    labels = _fitting(said, keep, labels)
    if causal and output.by_token:
        # Neither a first token nor padding is foretold.
        following = keep.roll(-1, 1)
        following[:, -1] = False
        labels = labels.roll(-1, 1).where(following, IGNORED)
    labels = labels[keep] if output.by_token else labels
    if output.probable:
        return nll_loss(output.rows, labels.long(), ignore_index=IGNORED, reduction="sum")
    return (output.rows.squeeze(-1) - labels).square().sum() / 2


def _fitting(said: Sequence[Output], keep: Tensor, labels: Tensor) -> Tensor:
    """The labels, [sequences] or [sequences, length], if they are what the output asks for."""
    output = said[0]
    if [other.name for other in said] != ["logits"]:
        raise CalibrationError(
            f"labels are compared with `logits`, the model gives {' and '.join(other.name for other in said)}: leave them out"
        )
    shape = keep.shape if output.by_token else keep.shape[:1]
    labels = labels.squeeze(-1) if labels.shape == (*shape, 1) else labels
    if labels.shape != shape or (output.probable and labels.is_floating_point()):
        kind = "integer labels" if output.probable else "numbers as labels"
        raise CalibrationError(
            f"expected {kind} of shape {list(shape)} for logits of shape {list(output.rows.shape)}, got {labels.dtype} of "
            f"shape {list(labels.shape)}"
        )
    classes = output.rows.shape[-1]
    if output.probable and not bool(((labels == IGNORED) | ((labels >= 0) & (labels < classes))).all()):
        raise CalibrationError(
            f"expected labels from 0 to {classes} - 1, or {IGNORED} for those that do not count, got labels from "
            f"{int(labels.min())} to {int(labels.max())}"
        )
    return labels


def drawn(said: Sequence[Output], seed: int) -> Tensor:
    """Negative log-likelihood of labels drawn from the model's own predictive distribution, summed: a scalar.

    Then the expected squared gradient is the Fisher information itself (Kunstner et al. 2019, section 2: the true Fisher,
    not the empirical one). The model's own probabilities as soft labels would not do: their cross entropy is at its least,
    so every gradient of a sequence is zero. Nor would the most likely labels: where the model is sure, their loss hardly has
    a gradient, and elsewhere only one class of many is asked about.

    Args:
        said: the model's outputs.
        seed: of the draws, which repeat on the same device.
    """
    return torch.stack([_drawn(output, seed + number) for number, output in enumerate(said)]).sum()


def _drawn(output: Output, seed: int) -> Tensor:
    rows = output.rows
    generator = torch.Generator(rows.device).manual_seed(seed)
    if output.probable:
        labels = torch.multinomial(rows.detach().exp(), 1, generator=generator).squeeze(-1)
        return nll_loss(rows, labels, reduction="sum")
    # A number y ~ N(output, 1): the gradient of (output - y)^2 / 2 is a standard normal number times that of the output.
    noise = torch.randn(rows.shape, generator=generator, device=rows.device, dtype=rows.dtype)
    if output.name == "hidden":
        # Hidden states have no unit of their own; relative to its size, every sequence counts alike.
        noise = noise / rows.detach().square().mean(-1, keepdim=True).sqrt().clamp_min(SMALL)
    return (noise * rows).sum()
