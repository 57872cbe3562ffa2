"""FLAP (An et al. 2024, "Fluctuation-based Adaptive Structured Pruning"): the mean of what was removed goes into the bias."""

from __future__ import annotations

from benchmarks.baselines.least_squares import mean
from benchmarks.baselines.site_data import Answer, Rule, SiteData


def solve(data: SiteData) -> Answer:
    """W' = W_u, b' = b + mu_m W_m, with means over the dense model's tokens. A bias is created where there is none."""
    removed = data.removed
    if not len(removed):
        return data.kept_weight, data.bias
    moved = mean(data.dense_inputs)[removed] @ data.weight[removed]
    return data.kept_weight, moved if data.bias is None else data.bias + moved


RULE = Rule(solve, frozenset({"dense_inputs"}))
