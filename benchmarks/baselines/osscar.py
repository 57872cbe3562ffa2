"""OSSCAR's weight update (Meng et al. 2024, arXiv 2403.12983), on a mask made elsewhere: its default and its full form."""

from __future__ import annotations

from benchmarks.baselines.least_squares import cross, damped, dot
from benchmarks.baselines.site_data import Answer, Rule, SiteData

# Relative to the mean diagonal; the default (`lambda2`) of the authors' code.
DAMPING = 1e-2


def solve(data: SiteData, damping: float = DAMPING) -> Answer:
    """(G_uu + c mean(diag G) 1) V = G_u: W + c mean(diag G) W_u, with G = X_hat' X_hat; the bias stays.

    X_hat are inputs on the pruned stream: the target is what the dense weights make of them, and the damping pulls toward the
    kept weights. The authors take the statistics of both sites of a block before either is cut; here the second site sees the
    first one cut, as for the other rules.
    """
    kept = data.inputs[:, data.kept]
    damping = damping * dot(data.inputs, data.inputs) / len(data.weight)
    right = cross(kept, data.inputs) @ data.weight
    return damped(cross(kept, kept), right + damping * data.kept_weight, damping), data.bias


def solve_full(data: SiteData) -> Answer:
    """(G_uu + c mean(diag G) 1) V = X_hat_u' X W + c mean(diag X_hat' X) W_u; the bias stays.

    X are the dense model's inputs, so the target is the layer's own dense output, with no residual term: the option `fullseq`
    of the authors' code.
    """
    kept = data.inputs[:, data.kept]
    right = cross(kept, data.dense_inputs) @ data.weight
    own, shared = (dot(data.inputs, rows) / len(data.weight) for rows in (data.inputs, data.dense_inputs))
    return damped(cross(kept, kept), right + DAMPING * shared * data.kept_weight, DAMPING * own), data.bias


RULE = Rule(solve, frozenset({"inputs"}))
FULL = Rule(solve_full, frozenset({"inputs", "dense_inputs"}))
