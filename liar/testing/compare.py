"""What the checks compare: outputs of models at their real tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from liar.data import Calibration
from liar.models import base_and_prefix


def last_hidden(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The last hidden states of the bare model for one batch, [sequences, length, hidden]."""
    base, _ = base_and_prefix(model)
    with torch.no_grad():
        output = base(**Calibration.of([batch], model).batches[0])[0]
    assert isinstance(output, Tensor)
    return output


def close(actual: Tensor, expected: Tensor, token_mask: Tensor, what: str) -> None:
    """Compare at the real tokens, relative to the scale of what is expected."""
    actual, expected = actual[token_mask], expected[token_mask]
    scale = float(expected.square().mean().sqrt())
    try:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * scale)
    except AssertionError as error:
        raise AssertionError(f"{what}\n{error}") from error
