"""Cut and do nothing else: the control."""

from __future__ import annotations

from benchmarks.baselines.site_data import Answer, Rule, SiteData


def solve(data: SiteData) -> Answer:
    """W' = W_u, b' = b."""
    return data.kept_weight, data.bias


RULE = Rule(solve)
