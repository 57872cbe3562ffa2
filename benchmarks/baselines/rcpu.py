"""Our reading of RCPU's update (Haruta et al. 2025, arXiv 2510.07782): the kept weights, rotated in the space of the outputs.

The abstract says what is fitted: the rotation that brings what the kept weights give nearest to the original output, which
keeps norms and angles, against overfitting. Of its variance-aware score nothing is used here: masks are made elsewhere.
"""

from __future__ import annotations

import torch

from benchmarks.baselines.least_squares import cross
from benchmarks.baselines.site_data import Answer, Rule, SiteData


def solve(data: SiteData) -> Answer:
    """W' = W_u R, with R = U V' from the singular value decomposition U S V' of (X_hat_u W_u)' (X W); the bias stays.

    That is the orthogonal R that minimises |X W - X_hat_u W_u R| (Schönemann 1966), X dense inputs, X_hat those on the pruned
    stream.
    """
    moments = data.kept_weight.T @ cross(data.kept_inputs, data.dense_inputs) @ data.weight
    left, _, right = torch.linalg.svd(moments)
    return data.kept_weight @ (left @ right), data.bias


RULE = Rule(solve, frozenset({"kept_inputs", "dense_inputs"}))
