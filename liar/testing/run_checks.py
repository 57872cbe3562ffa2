"""Checks of running the library: nothing changes where all is kept, repair helps elsewhere, errors do no harm."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from liar.api import reconstruct, select
from liar.data import Calibration
from liar.errors import LiarError
from liar.mask import Mask
from liar.models import Layout, layout_of
from liar.options import TARGETS, ReconstructOptions
from liar.repair import RepairContext, closed_form_steps, walk_blocks
from liar.runtime import preserve_model_state
from liar.surgery import remove
from liar.testing.compare import last_hidden
from liar.testing.state import assert_same_state, expect, model_state, same_bits
from liar.verdicts import Verdict


def keep_all(model: nn.Module, layout: Layout, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Keeping everything changes nothing, bit for bit."""
    everything = Mask({site.name: torch.ones(site.units, dtype=torch.bool) for site in layout.sites})
    for target in TARGETS:
        same = copy.deepcopy(model)
        before = {name: value.clone() for name, value in same.state_dict().items()}
        report = reconstruct(same, everything, batches[:2], target=target, progress=False)
        for name, value in same.state_dict().items():
            expect(same_bits(value, before[name]), f"target={target!r}: keeping everything has changed {name}")
        expect(set(report.verdicts.values()) == {Verdict.UNTOUCHED}, f"target={target!r}: expected every site untouched")


def repair(model: nn.Module, layout: Layout, mask: Mask, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Reconstruction on all batches but the last brings the output on the last one nearer to the dense model's."""
    *calibration_batches, new = batches
    bare, repaired = copy.deepcopy(model), copy.deepcopy(model)
    remove(bare, mask)
    report = reconstruct(repaired, mask, calibration_batches, progress=False)
    kept = {site.site: site.kept for site in report.sites}
    expect(kept == {name: mask.kept(name) for name in mask.masks}, f"the report says {kept} units were kept; the mask differs")
    token_mask = Calibration.of([new], model).token_masks[0]
    dense = last_hidden(model, new)[token_mask]
    worse, better = (float((last_hidden(m, new)[token_mask] - dense).square().mean()) for m in (bare, repaired))
    expect(better < worse, f"reconstruction raised the held-out error from {worse:.3g} to {better:.3g}; check residual")


def selection(model: nn.Module, layout: Layout, mask: Mask, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """The default criterion, which runs the model forward and back, gives a mask that keeps no more than the one given."""
    share = mask.parameters(layout) / layout.parameters
    try:
        selected = select(model, batches[:2], keep=share, progress=False)
    except (RuntimeError, TypeError, ValueError) as error:
        raise AssertionError(f"the default criterion does not run: {error}") from error
    kept = selected.parameters(layout) / layout.parameters
    expect(kept <= share, f"the default criterion kept {kept:.1%} of the parameters of the blocks, allowed were {share:.1%}")


def replay(model: nn.Module, layout: Layout, mask: Mask, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Replaying what the sublayers gave is the same as running them again."""
    calibration, options = Calibration.of(batches[:2], model), ReconstructOptions(ridge=0.01)
    without = replace(layout, sites=tuple(replace(site, sublayer=None) for site in layout.sites))
    with preserve_model_state(model):
        try:
            again, replayed = (
                walk_blocks(model, each, calibration, closed_form_steps(RepairContext(options, int)), mask=mask)
                for each in (without, layout)
            )
        except (RuntimeError, TypeError, ValueError) as error:
            raise AssertionError(f"sublayer: its output cannot be replayed: {error}") from error
    for other, one in zip(again, replayed, strict=True):
        for (name, value), expected in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
            same = torch.allclose(value, expected, rtol=1e-4, atol=1e-5)
            expect(same, f"sublayer: replaying it gives other weights in {name}; it must do nothing but feed the consumer")


def error(model: nn.Module, mask: Mask, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """An error in the middle leaves hooks, modes, weights and the random state as they were."""
    model.train()
    next(model.children()).eval()
    consumer = model.get_submodule(layout_of(model).sites[-1].module)
    handle = consumer.register_forward_hook(_fail)
    before = model_state(model)
    try:
        reconstruct(model, mask, batches, progress=False)
    except (_PlannedError, LiarError):
        assert_same_state(model, before)
    else:
        raise AssertionError("an error in a forward pass was swallowed")
    finally:
        handle.remove()


class _PlannedError(Exception):
    pass


def _fail(*_: Any) -> None:
    raise _PlannedError
