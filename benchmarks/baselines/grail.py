"""GRAIL (Tang et al. 2026, arXiv 2602.23795): ridge regression of the full hidden representation on the kept channels."""

from __future__ import annotations

from benchmarks.baselines.least_squares import cross, damped
from benchmarks.baselines.site_data import Answer, Rule, SiteData

# Relative to the mean diagonal of G_uu; the default of the authors' code for language models (its examples also use 0).
RIDGE = 1e-3


def solve(data: SiteData, ridge: float = RIDGE) -> Answer:
    """W' = M' W with M = (G_uu + a mean(diag G_uu) 1)^-1 G_u:, uncentred, on the pruned stream; the bias stays.

    M is applied to W before it is formed: M' W is [kept, out] at once. A site that keeps everything is not compensated.
    """
    if len(data.kept) == len(data.weight):
        return data.kept_weight, data.bias
    kept = data.inputs[:, data.kept]
    gram = cross(kept, kept)
    right = cross(kept, data.inputs) @ data.weight
    return damped(gram, right, ridge * float(gram.diagonal().mean())), data.bias


RULE = Rule(solve, frozenset({"inputs"}))
