"""The walk through the model: block by block, statistics, solve and fold, with the dense and the pruned stream side by side.

Memory beside the model and its slim copy: the hidden states of the two streams, what the dense model says about one block
(the targets of its sites and what their producers read), and the statistics of one site.
"""

from __future__ import annotations

from torch import Tensor, nn

from liar import slim
from liar.capture import block_calls
from liar.families import base_and_prefix
from liar.rebuild.dense_stream import on_pruned_stream
from liar.rebuild.job import BIASES, Job, Options, Pair
from liar.rebuild.same_input import on_dense_stream
from liar.sites import Layout

__all__ = ["BIASES", "TARGETS", "Job", "Options", "rebuild"]

TARGETS = ("dense_stream", "same_input")


def rebuild(job: Job, model: nn.Module, layout: Layout) -> list[nn.Module]:
    """The slim, repaired copy of every block, in order; the model itself is left alone."""
    base, _ = base_and_prefix(model)
    blocks = [model.get_submodule(name) for name in layout.blocks]
    with job.timed("enter"):
        dense, calls = block_calls(base, blocks, job.calibration.batches)
    # Without a pruned stream nothing may keep what entered the first block alive.
    pruned: list[Tensor] = list(dense) if job.options.target == "dense_stream" else []
    students: list[nn.Module] = []
    for number, (name, block) in enumerate(zip(layout.blocks, blocks, strict=True)):
        pair = Pair(block, slim.student(block), layout.of_block(name), calls[number])
        for site in pair.sites:
            slim.cut_site(pair.student, site, job.mask[site.name])
        if job.options.target == "same_input":
            on_dense_stream(job, pair, dense)
        else:
            on_pruned_stream(job, pair, dense, pruned, last=number == len(blocks) - 1)
        students.append(pair.student)
    return students
