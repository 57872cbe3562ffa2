"""The matrices Q and P of our reading of LIAR, for whoever wants to look at which kept unit stands in for which removed one.

`liar.reconstruct` solves for the new weights directly, which is the same and cheaper; it does not use this module.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from liar.errors import MaskError, OptionError, check_choice
from liar.options import check_ridge
from liar.solve import fit
from liar.statistics import Moments, Normal
from liar.verdicts import Verdict


@dataclass(frozen=True)
class Interpolation:
    """Removed channels as an affine function of kept ones: `X_m ~ X_u Q + P` (docs/theory.md, "Our reading of LIAR").

    Attributes:
        Q: [kept, removed], interpolates the weights.
        P: [removed], interpolates the bias.
        kept: indices of the kept channels.
        removed: indices of the removed channels.
        verdict: how the solve ended.

    Example:
        >>> moments = liar.moments(model, calib, sites=["heads.0"])["heads.0"]
        >>> found = liar.interpolation(moments, torch.tensor([True, True, True, False]))
        >>> found.Q.shape, found.kept[-1].item(), found.removed[0].item()
        (torch.Size([24, 8]), 23, 24)
    """

    Q: Tensor
    P: Tensor
    kept: Tensor
    removed: Tensor
    verdict: Verdict

    def interpolate(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and bias of the kept channels: weight [channels, out], bias [out] -> `W_u + Q W_m`, `b + P W_m`."""
        removed = weight[self.removed].double()
        return weight[self.kept].double() + self.Q @ removed, bias.double() + self.P @ removed


def interpolation(moments: Moments, unit_mask: Tensor, *, ridge: float = 0.0, solver: str = "auto") -> Interpolation:
    """Q and P of one site from the moments of its consumer's input (`liar.moments`), for any choice of kept units.

    Args:
        moments: of all channels of the consumer's input.
        unit_mask: bool [units], True stays; a unit is `channels / units` neighbouring channels.
        ridge: pulls Q toward zero, relative to the mean diagonal of the Gram matrix.
        solver: `"auto"`, `"cholesky"` or `"eigh"`.

    The fit has an intercept (P). Layers without a bias are reconstructed without one, so there `reconstruct` solves another
    problem unless `bias="create"`.

    Raises:
        OptionError: an unknown solver, or a ridge that is not a number >= 0.
        MaskError: `unit_mask` does not divide the channels, or keeps nothing.
        CalibrationError: the moments hold no rows, or NaN or Inf.

    Example:
        >>> x = torch.randn(50, 2, dtype=torch.float64)
        >>> moments = Moments()
        >>> moments.update(torch.cat([x, x[:, :1] * 2 + 1], 1), x[:, :0])
        >>> found = interpolation(moments, torch.tensor([True, True, False]))
        >>> found.Q.round(decimals=3).flatten().tolist() == [2, 0], found.P.round(decimals=3).tolist()
        (True, [1.0])
    """
    check_choice("solver", solver, ("auto", "cholesky", "eigh"))
    check_ridge("ridge", ridge)
    if ridge == "auto":  # type: ignore[comparison-overlap]
        raise OptionError(f"ridge={ridge!r}: expected a number; moments hold nothing out to choose one by")
    if not isinstance(moments, Moments):
        raise MaskError(f"expected the Moments of one site, got a {type(moments).__name__}; see liar.moments")
    try:
        unit_mask = torch.as_tensor(unit_mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise MaskError(f"expected bool [units], got a {type(unit_mask).__name__}") from error
    all_channels = moments.normal(affine=True)
    channels = len(all_channels.gram)
    if unit_mask.dtype != torch.bool or unit_mask.ndim != 1 or not unit_mask.any() or channels % len(unit_mask):
        raise MaskError(
            f"expected bool [units] with at least one kept unit and units that divide {channels} channels, "
            f"got {unit_mask.dtype} {list(unit_mask.shape)} with {int(unit_mask.count_nonzero())} kept"
        )
    stays = unit_mask.to(all_channels.gram.device).repeat_interleave(channels // len(unit_mask))
    kept, removed = stays.nonzero().squeeze(1), (~stays).nonzero().squeeze(1)
    rows = all_channels.gram[kept]
    normal = Normal(
        count=all_channels.count,
        weight_sum=all_channels.weight_sum,
        gram=rows[:, kept],
        cross=rows[:, removed],
        target_energies=all_channels.gram.diagonal()[removed],
        mean_z=all_channels.mean_z[kept],
        mean_t=all_channels.mean_z[removed],
        affine=True,
        rank_tolerance=all_channels.rank_tolerance,
    )
    zeros = torch.zeros_like(normal.cross)
    solution = fit(normal, [], zeros, torch.zeros_like(normal.mean_t), ridge=ridge, solver=solver)
    return Interpolation(Q=solution.weight, P=solution.bias, kept=kept, removed=removed, verdict=solution.verdict)
