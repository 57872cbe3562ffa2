"""K-prune's knowledge-preserving weight tuning (Park et al. 2024, arXiv 2308.03449)."""

from __future__ import annotations

from benchmarks.baselines.least_squares import cross, minimum_norm
from benchmarks.baselines.site_data import Answer, Rule, SiteData


def solve(data: SiteData) -> Answer:
    """min_V |Z_hat V - (dense stream after the sub-layer - pruned residual - b)|^2, uncentred, no ridge; the bias stays."""
    gram = cross(data.kept_inputs, data.kept_inputs)
    return minimum_norm(gram, cross(data.kept_inputs, data.target())), data.bias


RULE = Rule(solve, frozenset({"kept_inputs", "dense_sum", "residual"}))
