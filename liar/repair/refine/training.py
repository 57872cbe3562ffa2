"""Gradient descent on a few tensors, ended by what is held out: AdamW, a linear decay, the best values kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from liar.errors import CalibrationError
from liar.options import RefineOptions


@dataclass
class Training:
    """The course of one training.

    Attributes:
        losses: mean squared error of every step's batch, before the step.
        held_out: (steps done, mean squared error on the held-out batches), before the first step and after every epoch.
    """

    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)

    @property
    def best(self) -> float:
        """The smallest error on the held-out batches."""
        return min(error for _, error in self.held_out)


def train(
    parameters: Sequence[nn.Parameter],
    batches: Sequence[int],
    loss: Callable[[int], Tensor],
    held_out: Callable[[], float],
    options: RefineOptions,
    advance: Callable[[float], object],
    *,
    hold_zeros: bool = True,
    select: bool = True,
) -> Training:
    """Train, and leave the values with the smallest error on held-out batches in place.

    Args:
        parameters: what is trained.
        batches: numbers of the batches, one step of the optimizer each; every epoch in another order.
        loss: the error of one batch.
        held_out: the error on the held-out batches.
        options: learning rate, epochs and the like.
        advance: called with the share of the epochs that is over since.
        hold_zeros: weights that are zero stay zero, so that masks of single weights hold.
        select: False trains for all epochs and keeps the last values, whatever is held out.

    Raises:
        CalibrationError: the error on the held-out batches is not finite before the first step.
    """
    course = Training(held_out=[(0, held_out())])
    if not math.isfinite(course.best):
        raise CalibrationError("activations are NaN or infinite on held-out sequences")
    if course.best == 0:
        return course
    best = [each.detach().clone() for each in parameters]
    kept = [_mask(each) if hold_zeros else None for each in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0)
    total = options.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, total, round(options.warmup * total)))
    generator = torch.Generator().manual_seed(options.seed)
    for _ in range(options.epochs):
        for place in torch.randperm(len(batches), generator=generator).tolist():
            with torch.enable_grad():
                value = loss(batches[place])
            gradients = torch.autograd.grad(value, parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            schedule.step()
            for parameter, mask in zip(parameters, kept, strict=True):
                if mask is not None:
                    parameter.data.mul_(mask)
            course.losses.append(float(value))
        error, before = held_out(), course.best
        course.held_out.append((len(course.losses), error))
        if error < before or not select:
            best = [each.detach().clone() for each in parameters]
        advance(1 / options.epochs)
        if not math.isfinite(error) or (select and _since_best(course) >= options.patience):
            break
    for parameter, value in zip(parameters, best, strict=True):
        parameter.data.copy_(value)
        parameter.grad = None
    return course


def rate(step: int, total: int, warmup: int) -> float:
    """The factor of the learning rate: it rises for `warmup` steps, and falls linearly to zero after `total`."""
    return (step + 1) / warmup if step < warmup else (total - step) / max(1, total - warmup)


def _mask(parameter: nn.Parameter) -> Tensor | None:
    """Which entries of a matrix are not zero; None where all are, or where it is a bias."""
    mask = parameter.detach() != 0
    return None if parameter.ndim < 2 or bool(mask.all()) else mask


def _since_best(course: Training) -> int:
    """How many epochs ago the error on the held-out batches was smallest."""
    errors = [error for _, error in course.held_out]
    return len(errors) - 1 - errors.index(course.best)
