"""From a closed-form rule to a smaller model: the walk brings the rows of every site, and the rule's answer is put in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import liar
from liar import slim
from liar.batches import Calibration
from liar.capture import preserved
from liar.fold import fold, start
from liar.sites import Site, linear
from rivals.site_data import Rule, SiteData
from rivals.walk import Rows, Walk


def repair(model: nn.Module, mask: liar.Mask, calib: Sequence[Any], rule: Rule) -> None:
    """Cut the model and repair every site with the rule; the model gets smaller in place."""
    with preserved(model):
        walk = Walk(model, mask, Calibration.of(calib, model), rule.needs)
        students = [repaired(walk, number, rule) for number in range(len(walk.blocks))]
    walk.finish(students)


def repaired(walk: Walk, number: int, rule: Rule) -> nn.Module:
    """The cut and repaired copy of a block. Before anything was cut, a site that keeps everything is left alone."""
    student = slim.student(walk.blocks[number])
    rows = walk.dense_rows(number)
    for site in walk.sites(number):
        keep = walk.mask[site.name]
        if walk.mask.whole(site.name) and not walk.changed:
            continue
        walk.changed = True
        if "inputs" in walk.needs:
            rows[site.name] |= walk.pruned_rows(number, student, site, "inputs")
        slim.cut_site(student, site, keep)
        if "kept_inputs" in walk.needs:
            rows[site.name] |= walk.pruned_rows(number, student, site, "kept_inputs")
        weight, bias = rule.solve(site_data(walk, number, site, rows.pop(site.name)))
        consumer = linear(student, site.consumer)
        fold(consumer, weight, start(consumer)[1] if bias is None else bias, create_bias=bias is not None)
    walk.advance(number, student)
    return student


def site_data(walk: Walk, number: int, site: Site, rows: Rows) -> SiteData:
    """The rows of a site with its dense weights and what stays of it."""
    consumer, keep = linear(walk.blocks[number], site.consumer), walk.mask[site.name]
    empty = torch.empty(0)
    return SiteData(
        kind=site.kind,
        kept=site.consumer.channels(keep),
        unit=torch.arange(int(keep.sum())).repeat_interleave(site.consumer.width),
        weight=consumer.weight.detach().double().T,
        bias=None if consumer.bias is None else consumer.bias.detach().double(),
        dense_inputs=rows.get("dense_inputs", empty),
        inputs=rows.get("inputs", empty),
        kept_inputs=rows.get("kept_inputs", empty),
        dense_sum=rows.get("dense_sum", empty),
        residual=rows.get("residual", empty),
    )
