"""What a rule may look at when it repairs one site: raw rows, no models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Need = Literal["dense_inputs", "inputs", "kept_inputs", "dense_sum", "residual"]
# (weight [kept, out], bias [out] or None); a bias where the layer has none is created.
Answer = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class SiteData:
    """One site: its consumer's dense weight, and rows of the calibration tokens (padding already dropped).

    The five tensors of rows are empty unless the rule says that it needs them (see `Rule`).

    Attributes:
        kind: `"heads"` or `"neurons"`.
        kept: int64 [kept], the channels that stay.
        unit: int64 [kept], the number (from 0, without gaps) of the unit each kept channel belongs to.
        weight: float64 [channels, out], the dense weight.
        bias: float64 [out], or None where the consumer has none.
        dense_inputs: [tokens, channels], what the consumer reads in the dense model.
        inputs: [tokens, channels], what it would read on the pruned stream if its own sub-layer were not cut.
        kept_inputs: [tokens, kept], the kept channels of `inputs`.
        dense_sum: [tokens, out], the dense residual stream after the sub-layer (residual plus consumer output).
        residual: [tokens, out], the pruned model's stream that the consumer's output is added to.
    """

    kind: str
    kept: Tensor
    unit: Tensor
    weight: Tensor
    bias: Tensor | None
    dense_inputs: Tensor
    inputs: Tensor
    kept_inputs: Tensor
    dense_sum: Tensor
    residual: Tensor

    @property
    def kept_weight(self) -> Tensor:
        """[kept, out]: what stays of the weight if nothing is repaired."""
        return self.weight[self.kept]

    @property
    def removed(self) -> Tensor:
        """int64 [removed], the channels that go."""
        gone = self.kept.new_ones(len(self.weight))
        gone[self.kept] = 0
        return gone.nonzero().squeeze(1)

    def target(self) -> Tensor:
        """[tokens, out]: what the consumer's weights should add to the pruned stream to make it the dense one."""
        target = self.dense_sum.double() - self.residual.double()
        return target if self.bias is None else target - self.bias


@dataclass(frozen=True)
class Rule:
    """A closed-form rule: pure mathematics of one site, and the rows it looks at.

    Attributes:
        solve: from the rows of a site to its weights.
        needs: those rows.
        teacher: share of the block parameters that is kept -> that of the model whose stream is the target; None if that is
            the dense model.
    """

    solve: Callable[[SiteData], Answer]
    needs: frozenset[Need] = frozenset()
    teacher: Callable[[float], float] | None = None
