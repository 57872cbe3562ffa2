"""The output of the finished model beside the dense model's: what the repair is worth where it counts.

The errors of the sites are errors of activations; a user wants to know what comes out. So a few sequences go through the dense
model, through the same model with its cut and repaired blocks, and through one whose blocks are cut and nothing else. All three
are one model: for a pass, other blocks run in place of its own. The blocks of the mask alone are cut one at a time, when they
run, so that never more than one of them is there.

Which sequences. The fit reads all calibration data: the least squares become better by every sequence, and weights must not
depend on whether somebody looks at the result. So by default a few of the sequences that the fit has seen are compared, and the
report says so, in words that promise less: such numbers flatter the repair, the more the fewer tokens there are. Numbers on
text that nothing was fitted to need text to spare: `held_out` batches, what the command line finds left over in its texts, or
`set_aside=True`, which takes sequences out of the calibration data and says so, too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, logsigmoid

from liar.data import Calibration, split, take
from liar.errors import ModelError
from liar.mask import Mask
from liar.models import Layout, Site, compute_device, is_dispatched, on_device, plain_block
from liar.report import Measure, Quality
from liar.runtime import Output, distributed, outputs_of, preserve_model_state, replace_forwards
from liar.surgery import copy_block, cut_site

T = TypeVar("T")

# Sequences that are compared if nobody says how many: a 32nd of the calibration data, at most 16; of little data an eighth, up
# to 4. Then three passes over them take a few per cent of the time of a run, which reads all data several times.
MOST, PART = 16, 32
FEW, PART_OF_LITTLE = 4, 8
# Numbers in the outputs of one pass: all of three models' are there at a time.
NUMBERS = 2**25


def sequences_to_compare(quality: int | str, sequences: int) -> int:
    """How many sequences `quality` means, where there are so many calibration sequences."""
    if quality != "auto":
        return int(quality)
    return max(min(MOST, sequences // PART), min(FEW, sequences // PART_OF_LITTLE), 1)


def compare_outputs(
    model: nn.Module,
    layout: Layout,
    mask: Mask,
    repaired_blocks: Sequence[nn.Module],
    compared: Calibration,
    *,
    held_out: bool,
    teacher: nn.Module | None = None,
) -> Quality:
    """Compare the repaired model, and the one with the mask alone, with the dense model; see the top of this file.

    Args:
        model: the model that is repaired, with its task head if it has one; it is left alone.
        layout: its sites.
        mask: the units that stay.
        repaired_blocks: the cut and repaired copy of every block.
        compared: the sequences.
        held_out: whether nothing was fitted to them.
        teacher: the dense model, if that is not `model` as it is.

    Raises:
        ModelError: the outputs are of a kind that cannot be compared.
        CalibrationError: the model does not take a batch.
    """
    layout = layout.matching(mask.masks)
    blocks = [model.get_submodule(name) for name in layout.blocks]
    sites = [layout.of_block(name) for name in layout.blocks]
    device = compute_device(model)
    # Copies, since others run in place of the model's own.
    copies = [block if is_dispatched(block) else copy_block(block) for block in blocks]
    cut = [partial(_run_cut, block, device, own, mask) for block, own in zip(copies, sites, strict=True)]
    variants: dict[str, Sequence[Callable[..., Any]]] = {
        "repaired": [partial(_run_repaired, each, device) for each in repaired_blocks],
        "mask_only": cut,
    }
    sums: defaultdict[tuple[str, str], dict[str, Tensor]] = defaultdict(dict)
    counts: defaultdict[str, int] = defaultdict(int)
    source = model if teacher is None else teacher
    with preserve_model_state(model), preserve_model_state(source):
        for block in repaired_blocks:
            block.eval()
        parts, every = _in_passes(model, compared)
        parts = distributed.share(parts, model)
        for number in range(len(parts.batches)):
            dense = outputs_of(source, parts, number, every=every)
            for output in dense:
                counts[output.name] += len(output.rows)
            for variant, forwards in variants.items():
                with replace_forwards(blocks, forwards):
                    changed = outputs_of(model, parts, number, every=every)
                _check_comparable(dense, changed)
                for one, other in zip(dense, changed, strict=True):
                    for metric, values in distances(one, other).items():
                        total = sums[one.name, metric]
                        total[variant] = total.get(variant, 0) + values.sum(dtype=torch.float64)
    numbers = {(*key, variant): float(total) for key, by_variant in sums.items() for variant, total in by_variant.items()}
    total_counts, totals = (_added(distributed.gather(dict(each))) for each in (counts, numbers))
    means: defaultdict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for (output, metric, variant), value in totals.items():
        means[output, metric][variant] = value / max(total_counts[output], 1)
    return Quality(
        measures=tuple(
            Measure(output, metric, **{variant: FINISH.get(metric, float)(mean) for variant, mean in by_variant.items()})
            for (output, metric), by_variant in means.items()
        ),
        sequences=compared.sequences,
        tokens=compared.tokens,
        predictions=int(max(total_counts.values(), default=0)),
        held_out=held_out,
    )


def _added(parts: Sequence[Mapping[T, float]]) -> dict[T, float]:
    """Sums by key; not every part has to have every key."""
    keys = dict.fromkeys(key for part in parts for key in part)
    return {key: sum(part.get(key, 0) for part in parts) for key in keys}


def _check_comparable(dense: Sequence[Output], changed: Sequence[Output]) -> None:
    """Check that two models, which may have other heads, have outputs of the same names, kinds and sizes.

    Raises:
        ModelError: they do not.
    """
    shapes = [{output.name: (output.kind, list(output.rows.shape)) for output in outputs} for outputs in (dense, changed)]
    if shapes[0] != shapes[1]:
        raise ModelError(f"the teacher's outputs are {shapes[0]}, the model's {shapes[1]}: they cannot be compared")


def distances(dense: Output, other: Output) -> dict[str, Tensor]:
    """For every row of an output, by metric (see `liar.report.METRICS`; the square of a difference): each [rows]."""
    p, q = dense.rows, other.rows
    if dense.kind == "classes":
        return {"kl": (p.exp() * (p - q)).sum(-1), "agreement": (p.argmax(-1) == q.argmax(-1)).to(p)}
    if dense.kind == "labels":
        sides = ((sign * p, sign * q) for sign in (1, -1))
        divergence = sum(one.sigmoid() * (logsigmoid(one) - logsigmoid(two)) for one, two in sides)
        assert isinstance(divergence, Tensor)
        return {"kl": divergence.sum(-1), "agreement": ((p > 0) == (q > 0)).to(p).mean(-1)}
    if dense.name in ("hidden", "embeddings"):
        return {"cosine": cosine_similarity(p, q, dim=-1)}
    return {"difference": (p - q).square().mean(-1)}


# What is done to a mean over rows, if anything.
FINISH: dict[str, Callable[[float], float]] = {"difference": lambda mean: mean**0.5}


def _run_repaired(block: nn.Module, device: torch.device, *args: Any, **kwargs: Any) -> Any:
    """Run a finished block, which may be kept elsewhere than where the model computes."""
    return on_device(block, device)(*args, **kwargs)


def _run_cut(block: nn.Module, device: torch.device, sites: Sequence[Site], mask: Mask, *args: Any, **kwargs: Any) -> Any:
    """Cut a copy of a block, run it, and forget it."""
    cut = copy_block(plain_block(block, device))
    for site in sites:
        cut_site(cut, site, mask[site.name])
    return cut.eval()(*args, **kwargs)


def _in_passes(model: nn.Module, compared: Calibration) -> tuple[Calibration, int]:
    """The sequences in batches whose outputs fit in memory, and every which position of them is compared.

    Only where the outputs of a single sequence are too many, and the model can leave some out, are positions left out.
    """
    first = outputs_of(model, take(compared, [(0, torch.zeros(1, dtype=torch.int64))]), 0)
    widest = max((output.rows.shape[-1] for output in first if output.by_token), default=1)
    longest = max(mask.shape[1] for mask in compared.token_masks)
    can_leave_out = widest > 1 and "logits_to_keep" in signature(model.forward).parameters
    every = max(longest * widest // NUMBERS, 1) if can_leave_out else 1
    return split(compared, max(NUMBERS * every // (longest * widest), 1)), every
