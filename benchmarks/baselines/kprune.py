"""K-prune's knowledge-preserving weight tuning (Park et al. 2024, arXiv 2308.03449), and the same with a ridge."""

from __future__ import annotations

from benchmarks.baselines.least_squares import cross, damped, minimum_norm
from benchmarks.baselines.site_data import Answer, Rule, SiteData

# Relative to the mean diagonal.
RIDGE = 1e-2


def solve(data: SiteData) -> Answer:
    """min_V |Z_hat V - (dense stream after the sub-layer - pruned residual - b)|^2, uncentred, no ridge; the bias stays."""
    gram = cross(data.kept_inputs, data.kept_inputs)
    return minimum_norm(gram, cross(data.kept_inputs, data.target())), data.bias


def solve_with_ridge(data: SiteData) -> Answer:
    """The same with a ridge toward the kept weights: not published, but what a user of K-prune would try next."""
    gram = cross(data.kept_inputs, data.kept_inputs)
    damping = RIDGE * float(gram.diagonal().mean())
    return damped(gram, cross(data.kept_inputs, data.target()) + damping * data.kept_weight, damping), data.bias


RULE = Rule(solve, frozenset({"kept_inputs", "dense_sum", "residual"}))
RIDGED = Rule(solve_with_ridge, RULE.needs)
