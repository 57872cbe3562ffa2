"""Query heads that share keys and values: equally many stay in every group, the best of each.

How many stay is decided for the first, second, ... best of all groups together: a rank has the cost of one head in every group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from liar.mask import Mask
from liar.models import Edge, Layout, Segment, Site


def by_rank(layout: Layout) -> Layout:
    """The layout in which the query heads of one rank, one of every group, are a unit; other sites as they are."""
    return replace(layout, sites=tuple(_ranked(site) if site.groups else site for site in layout.sites))


def rank_scores(scores: Tensor, site: Site) -> Tensor:
    """Means over the groups of the best scores, of the second best, and so on: [units] -> [units of a group]."""
    return scores.view(site.groups, -1).sort(descending=True).values.mean(0)


def best_of_groups(mask: Mask, scores: Mapping[str, Tensor], layout: Layout) -> Mask:
    """The units that stay, from how many ranks of each site do."""
    masks = {
        site.name: _best(scores[site.name].view(site.groups, -1), mask.kept(site.name)) if site.groups else mask[site.name]
        for site in layout.sites
    }
    return replace(mask, masks=masks)


def _ranked(site: Site) -> Site:
    ranks = site.units // site.groups
    return replace(
        site,
        units=ranks,
        producers=tuple(_of_all_groups(edge, ranks, site.groups) for edge in site.producers),
        consumer=_of_all_groups(site.consumer, ranks, site.groups),
        parameters=site.parameters * site.groups,
        groups=0,
    )


def _of_all_groups(edge: Edge, ranks: int, groups: int) -> Edge:
    (segment,) = edge.segments
    offsets = (segment.offset + group * ranks * segment.stride for group in range(groups))
    return replace(edge, segments=tuple(Segment(offset, segment.width, segment.stride) for offset in offsets))


def _best(scores: Tensor, count: int) -> Tensor:
    """The best units of every group, so many: [groups, units of a group] -> bool [units]."""
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, best.cpu(), True).flatten()
