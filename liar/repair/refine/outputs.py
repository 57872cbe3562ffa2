"""How far the whole model is from its teacher: what single windows do not see."""

from __future__ import annotations

from torch import nn

from liar.models import base_and_prefix
from liar.repair.refine.held_out import HeldOut
from liar.runtime import preserve_model_state, run_model, widen


def last_hidden_error(model: nn.Module, teacher: nn.Module, data: HeldOut) -> float:
    """Mean squared error of the last hidden states against the teacher's, on what is held out."""
    total, count = 0.0, 0
    with preserve_model_state(teacher), preserve_model_state(model):
        for number in data.held_out:
            batch, mask = data.calibration.batches[number], data.calibration.token_masks[number]
            ours, theirs = (widen(run_model(base_and_prefix(each)[0], batch, number)[0][mask]) for each in (model, teacher))
            difference = (ours - theirs).double()
            total, count = total + float(difference.square().sum()), count + difference.numel()
    return total / count
