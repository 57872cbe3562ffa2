"""How much an error in the residual stream moves the model's output: the Fisher information of the stream, without labels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from liar.calibration import Calibration
from liar.capture import Point
from liar.errors import at_site
from liar.gradients import SEED, STRIDE, differentiable, gradients, look
from liar.loss import drawn
from liar.sites import Layout, linear
from liar.statistics.normal import check_finite
from liar.streams import residual, wide


def sensitivities(model: nn.Module, layout: Layout, calibration: Calibration, progress: bool) -> tuple[dict[str, Tensor], int]:
    """Second moments of the gradient at the stream after each site, for errors relative to the size of the stream.

    With s a token of the stream and g the gradient there of the log-likelihood of a label drawn from the model's own
    prediction, F is the sum over tokens of `mean(s^2) g g'`, per output of the model. An error `sqrt(mean(s^2)) e` in every
    token, each with an e of its own, moves the output by `e' F e / 2` in Kullback-Leibler divergence on average and to second
    order; for the expected squared gradient of such draws is the Fisher information (Kunstner et al. 2019, section 2). Beside
    the Gram matrix of the inputs it is the other factor of K-FAC (Martens and Grosse 2015, section 3).

    Where there is no head, the output is the mean of the last hidden states over each sequence, relative to its size.

    Args:
        model: with its task head, if it has one.
        layout: its sites.
        calibration: batches; labels are not looked at.
        progress: show a bar.

    Returns:
        float32 [out, out] by site name, and of how many outputs (sequences, or tokens where each has its own).

    Raises:
        CalibrationError: NaN or Inf at a site, which it names.
        ModelError: parameters that gradients cannot be taken of.
    """
    consumers = {site.name: linear(model.get_submodule(site.block), site.consumer) for site in layout.sites}
    points = {name: Point(consumer, None) for name, consumer in consumers.items()}
    points |= {f"{site.name} residual": residual(model.get_submodule(site.block), site) for site in layout.sites}
    # Gradients flow down to the first site: its consumer makes all that comes after it differentiable.
    first = consumers[layout.sites[0].name].weight
    bar = tqdm(total=calibration.tokens, desc="sensitivity", unit="tok", unit_scale=True, disable=not progress)
    with differentiable(model, calibration, [first]) as ordinary, bar:
        weights = {name: consumer.weight for name, consumer in consumers.items()}
        found = {name: weight.new_zeros(len(weight), len(weight), dtype=torch.float32) for name, weight in weights.items()}
        count = 0
        for number, keep in enumerate(ordinary.keep):
            seen, said = look(model, layout, ordinary, number, points)
            slopes = gradients(drawn(said, SEED + STRIDE * number), [seen[name] for name in found])
            for name, slope in zip(found, slopes, strict=True):
                total = wide((seen[name] + seen[f"{name} residual"]).detach()[keep])
                scaled = (total.square().mean(1, keepdim=True).sqrt() * slope[keep]).float()
                found[name].addmm_(scaled.T, scaled)
            count += len(said[0].rows)
            bar.update(int(keep.sum()))
    # As in `unit_gradients`: the one named is where NaN began.
    for site in reversed(layout.sites):
        with at_site(site.name, site.module):
            check_finite(found[site.name], what="gradients")
    return {name: value / count for name, value in found.items()}, count
