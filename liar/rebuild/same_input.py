"""Every site from what its consumer reads and writes in the dense model: our reading of LIAR."""

from __future__ import annotations

from torch import Tensor

from liar.capture import Point, run, watching
from liar.rebuild.job import Job, Pair
from liar.sites import linear


def on_dense_stream(job: Job, pair: Pair, dense: list[Tensor]) -> None:
    """Repair all sites of a block in one pass of the dense block, and move the dense stream on."""
    sites = [site for site in pair.sites if not job.mask.whole(site.name)]
    folds = {site.name: job.folds() for site in sites}
    channels = {site.name: site.consumer.channels(job.mask[site.name]).to(dense[0].device) for site in sites}
    points: dict[str, Point] = {}
    for site in sites:
        consumer = linear(pair.block, site.consumer)
        points |= {f"{site.name} in": Point(consumer, 0), f"{site.name} out": Point(consumer, None)}
    for number, (call, rows) in enumerate(zip(pair.calls, job.rows, strict=True)):
        with job.timed("dense forward"), watching(points) as seen:
            dense[number] = run(pair.block, dense[number], call)
        with job.timed("statistics"):
            for site in sites:
                z, t = (rows(seen[f"{site.name} {end}"]) for end in ("in", "out"))
                folds[site.name].update(z.index_select(1, channels[site.name]), t, rows.sizes)
    for site in pair.sites:
        job.repair_consumer(pair, site, folds.get(site.name))
