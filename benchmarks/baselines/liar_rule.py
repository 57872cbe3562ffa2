"""Our reading of LIAR (Wang et al. 2024, arXiv 2407.13331): kept inputs stand in for removed ones, by centred least squares."""

from __future__ import annotations

from benchmarks.baselines.least_squares import cross, mean, minimum_norm, product
from benchmarks.baselines.site_data import Answer, Rule, SiteData


def solve(data: SiteData) -> Answer:
    """W' = W_u + Q W_m and b' = b + P W_m, with Q = C_uu^+ C_um and P = mu_m - mu_u Q.

    Q itself is not formed: the share of the removed channels in the output, X_m W_m, is regressed on X_u. A layer without
    bias is left without; its moments are then taken about zero, as no bias could carry the means.
    """
    kept, removed = data.dense_inputs[:, data.kept], data.dense_inputs[:, data.removed]
    lost = product(removed, data.weight[data.removed])
    if data.bias is None:
        return data.kept_weight + minimum_norm(cross(kept, kept), cross(kept, lost)), None
    centre = mean(kept)
    kept = kept - centre
    change = minimum_norm(cross(kept, kept), cross(kept, lost - mean(lost)))
    return data.kept_weight + change, data.bias + mean(lost) - centre @ change


RULE = Rule(solve, frozenset({"dense_inputs"}))
