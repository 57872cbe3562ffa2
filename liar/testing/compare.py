"""What the checks compare: models with units cut off, and their outputs at the tokens that are kept."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from liar import slim
from liar.batches import Calibration
from liar.families import base_and_prefix
from liar.mask import Mask
from liar.sites import Layout


def without(model: nn.Module, layout: Layout, mask: Mask) -> None:
    """Remove units for good and repair nothing."""
    for name in layout.blocks:
        block = model.get_submodule(name)
        student = slim.student(block)
        for site in layout.of_block(name):
            slim.cut_site(student, site, mask[site.name])
        slim.adopt(block, student)


def last_hidden(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """What the bare model hands on for one batch, [sequences, length, hidden]."""
    base, _ = base_and_prefix(model)
    with torch.no_grad():
        output = base(**Calibration.of([batch], model).batches[0])[0]
    assert isinstance(output, Tensor)
    return output


def close(got: Tensor, wanted: Tensor, keep: Tensor, what: str) -> None:
    """Compare at the kept tokens, by the scale of what is wanted."""
    got, wanted = got[keep], wanted[keep]
    scale = float(wanted.square().mean().sqrt())
    try:
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * scale)
    except AssertionError as error:
        raise AssertionError(f"{what}\n{error}") from error
