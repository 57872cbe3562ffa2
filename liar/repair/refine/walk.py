"""The walk over windows: each is trained on copies of its blocks, and what comes of it is kept until all are done."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

from torch import Tensor, nn

from liar.errors import at_site
from liar.models import LayerView, Layout
from liar.options import RefineOptions
from liar.repair.refine.fits import Fit, fit_of
from liar.repair.refine.held_out import HeldOut
from liar.repair.refine.lora import low_rank
from liar.repair.refine.plan import Window, windows_of
from liar.repair.refine.streams import Side
from liar.repair.refine.training import Training, train
from liar.repair.state import DENSE, PRUNED
from liar.runtime import ActivationStore, preserve_model_state
from liar.verdicts import Verdict

# Weight and bias (None where there is none) of a layer, as it stores them.
Values = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Outcome:
    """How the training of one window ended.

    Attributes:
        window: what was trained.
        before: error on held-out sequences over the energy of what the window is to add, as the weights were.
        after: the same with the weights as they are now.
        verdict: `REFINED`, `KEPT_BASELINE`, or `UNTOUCHED` where there was no error to begin with.
        course: losses by step, and errors on held-out sequences by epoch.
        seconds: of preparation and training.
    """

    window: Window
    before: float
    after: float
    verdict: Verdict
    course: Training
    seconds: float


@dataclass
class Refinement:
    """What a walk found: an outcome for every window, and new values by the full names of layers."""

    outcomes: list[Outcome] = field(default_factory=list)
    values: dict[str, Values] = field(default_factory=dict)

    def write(self, model: nn.Module) -> None:
        """Put the new values into the model that they are for: as new parameters, and into no other layer."""
        for name, (weight, bias) in self.values.items():
            layer = LayerView.of(model.get_submodule(name), name)
            layer.write(layer.as_matrix(weight), weight.new_zeros(layer.size("out")) if bias is None else bias)


def refine_windows(
    model: nn.Module,
    layout: Layout,
    teacher: nn.Module,
    dense: Layout,
    data: HeldOut,
    options: RefineOptions,
    advance: Callable[[float], object] = lambda _: None,
    *,
    windows: Sequence[Window] | None = None,
    select: bool = True,
) -> Refinement:
    """Train window after window, in the order of the data; neither model is changed.

    Memory beside the models: the hidden states before the window, copies, gradients and moments of the blocks of one window,
    and the new values.

    Args:
        model: the student.
        layout: its sites.
        teacher: the dense model; the two fit together (see `check_teacher`).
        dense: its sites.
        data: what is trained on and held out.
        options: how.
        advance: called with the share of a window that is done since.
        windows: some of those that the options make of the model, in order; all of them if left out.
        select: False trains for all epochs and keeps the last values, as the studies do, whatever is held out.

    Raises:
        OptionError: windows are longer than the model.
        CalibrationError: activations are not finite.
    """
    store, result = ActivationStore(), Refinement()
    sides = Side(teacher, dense, DENSE, store, copies=False), Side(model, layout, PRUNED, store, copies=True)
    if windows is None:
        windows = windows_of(model, layout, teacher, dense, options.granularity)
    # Streams that nothing reads are not moved.
    moved = [side for side, unread in zip(sides, ("pruned", "dense"), strict=True) if options.propagation != unread]
    with preserve_model_state(teacher), preserve_model_state(model):
        for side in sides:
            side.enter(data.calibration)
        at = 0
        for window in windows:
            for side in moved:
                side.advance(range(at, window.start), range(len(data.calibration.batches)))
            at = window.start
            for side in sides:
                side.drop(at)
            result.outcomes.append(_refine(window, sides, data, options, result.values, advance, select=select))
    return result


def _refine(
    window: Window,
    sides: tuple[Side, Side],
    data: HeldOut,
    options: RefineOptions,
    values: dict[str, Values],
    advance: Callable[[float], object],
    *,
    select: bool,
) -> Outcome:
    """Train one window; its new values are added where they are better on what is held out."""
    began, (teacher, student) = time.perf_counter(), sides
    fit = fit_of(window, teacher, student, options.propagation, data.calibration.token_masks)
    for batch in range(len(data.calibration.batches)):
        fit.prepare(batch)
    initial = {layer: _values(student, *layer) for layer in window.layers}
    with at_site(window.name, window.module):
        course = _trained(fit, data, options, advance, select=select)
    for layer, values_before in initial.items():
        _round(student, *layer, zeros=values_before[0] == 0)
    before, energy = course.held_out[0][1], fit.energy(data.held_out)
    after = fit.error(data.held_out)
    better = after < before or not select
    for (number, name), value in initial.items():
        if better:
            values[f"{student.layout.blocks[number]}.{name}"] = _values(student, number, name)
        else:
            _restore(student, number, name, value)
    fit.discard()
    verdict = Verdict.REFINED if better else Verdict.KEPT_BASELINE if before else Verdict.UNTOUCHED
    scale = energy or math.nan
    return Outcome(window, before / scale, (after if better else before) / scale, verdict, course, time.perf_counter() - began)


def _trained(fit: Fit, data: HeldOut, options: RefineOptions, advance: Callable[[float], object], *, select: bool) -> Training:
    """Train the layers of a window, or low-rank updates of them."""
    window, student = fit.window, fit.student
    blocks: dict[nn.Module, list[str]] = {}
    for number, name in window.layers:
        blocks.setdefault(student.block(number), []).append(name)
    layers = [block.get_submodule(name) for block, names in blocks.items() for name in names]
    plain = [each for layer in layers for each in layer.parameters(recurse=False)]
    updates = nullcontext(plain) if options.lora is None else low_rank(blocks, options.lora, options.seed)
    with updates as parameters:
        for each in parameters:
            each.requires_grad_(True)
        try:
            error = lambda: fit.error(data.held_out)  # noqa: E731
            # Low-rank updates begin at zero.
            holds = options.lora is None
            return train(parameters, data.training, fit.loss, error, options, advance, hold_zeros=holds, select=select)
        finally:
            for each in parameters:
                each.requires_grad_(False)


def _layer(student: Side, number: int, name: str) -> LayerView:
    """A layer of the copies."""
    return LayerView.of(student.block(number).get_submodule(name), name)


def _values(student: Side, number: int, name: str) -> Values:
    """Weight and bias of a layer of the copies."""
    layer = _layer(student, number, name)
    return layer.weight.detach().clone(), None if layer.bias is None else layer.bias.detach().clone()


def _restore(student: Side, number: int, name: str, values: Values) -> None:
    layer = _layer(student, number, name)
    layer.weight.data.copy_(values[0])
    if layer.bias is not None and values[1] is not None:
        layer.bias.data.copy_(values[1])


def _round(student: Side, number: int, name: str, *, zeros: Tensor) -> None:
    """Let a trained layer have the values that the model can store, and zeros where its weight had some."""
    stored = LayerView.of(student.model.get_submodule(f"{student.layout.blocks[number]}.{name}"), name)
    layer = _layer(student, number, name)
    layer.weight.data.masked_fill_(zeros, 0)
    for own, other in ((layer.weight, stored.weight), (layer.bias, stored.bias)):
        if own is not None and other is not None:
            own.data.copy_(own.data.to(other.dtype))
