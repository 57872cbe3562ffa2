"""Checks of what the library makes of a model: nothing where all is kept, a better one where not, no harm on errors."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from liar.api import reconstruct
from liar.batches import Calibration
from liar.capture import preserved
from liar.errors import LiarError, Verdict
from liar.families import discover
from liar.mask import Mask
from liar.rebuild import TARGETS, Job, Options, rebuild
from liar.sites import Layout
from liar.testing.compare import last_hidden, without
from liar.testing.guest import assert_same_state, expect, guest_state, same_bits


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
    *seen, new = batches
    bare, repaired = copy.deepcopy(model), copy.deepcopy(model)
    without(bare, layout, mask)
    report = reconstruct(repaired, mask, seen, progress=False)
    kept = {site.site: site.kept for site in report.sites}
    expect(kept == {name: mask.kept(name) for name in mask.keep}, f"the report says {kept} units were kept; the mask differs")
    keep = Calibration.of([new], model).keep[0]
    dense = last_hidden(model, new)[keep]
    worse, better = (float((last_hidden(m, new)[keep] - dense).square().mean()) for m in (bare, repaired))
    expect(better < worse, f"reconstruction raised the held-out error from {worse:.3g} to {better:.3g}; check residual")


def replay(model: nn.Module, layout: Layout, mask: Mask, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Replaying what the mixers gave is the same as running them again."""
    again = replace(layout, sites=tuple(replace(site, mixer=None) for site in layout.sites))
    calibration, options = Calibration.of(batches[:2], model), Options("dense_stream", 0.01, True, "auto", "keep")
    with preserved(model):
        try:
            made = [rebuild(Job(mask, calibration, options, int), model, each) for each in (again, layout)]
        except (RuntimeError, TypeError, ValueError) as error:
            raise AssertionError(f"mixer: its output cannot be replayed: {error}") from error
        for other, one in zip(*made, strict=True):
            for (name, value), want in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
                close = torch.allclose(value, want, rtol=1e-4, atol=1e-5)
                expect(close, f"mixer: replaying it gives other weights in {name}; it must do nothing but feed the consumer")


def error(model: nn.Module, mask: Mask, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """An error in the middle leaves hooks, modes, weights and the random state as they were."""
    model.train()
    next(model.children()).eval()
    consumer = model.get_submodule(discover(model).sites[-1].module)
    handle = consumer.register_forward_hook(_fail)
    before = guest_state(model)
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
