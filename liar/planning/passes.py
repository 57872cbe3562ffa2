"""One pass of a model without memory: where the numbers of a `Workload` come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from inspect import signature
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from liar.models import Layout, Site, base_and_prefix, layer_of
from liar.models.layers import LayerView
from liar.planning.imitation import Tally, fakes, imitation
from liar.planning.workload import BlockSize, Data, Gradients, SiteSize, Workload
from liar.runtime import (
    ActivationStore,
    Point,
    calls_of,
    capture_activations,
    drawn,
    recompute_blocks,
    record_block_calls,
    run_block,
)
from liar.selection.fisher import LOGITS, OUTPUTS, SEQUENCES, TEXTS, TOKENS

STREAM = "dense"
# Where widths are free, one site keeps so much more than another, as a part of what goes: masks of real models are about as
# uneven (benchmarks/README.md, "Planning"); how uneven one will be is not known before.
UNEVEN = 0.25


def workload_of(
    model: nn.Module,
    layout: Layout,
    data: Data,
    kept: Mapping[str, int],
    *,
    weights: bool,
    is_free: bool = False,
    offload: bool = False,
) -> Workload:
    """Run a model without memory once, and note what that takes.

    Args:
        model: whole, or on the meta device.
        layout: its sites.
        data: how much there is.
        kept: units that stay by site.
        weights: whether the selection needs the gradients of weights.
        is_free: whether sites may keep more than that, and others less.
        offload: whether the weights come to the device one block at a time, so that blocks run once more for gradients.
    """
    with imitation(model) as fake:
        batch = fakes(data.batch)
        base, _ = base_and_prefix(fake)
        passes, calls = _block_passes(fake, base, layout, batch)
        with Tally() as whole, torch.no_grad():
            logits = _logits(fake(**batch))
        of_blocks = sum(tally.flops for tally in passes.values())
        shape = (data.batch_sequences, data.length)
        by_token = [value.shape[-1] for value in logits if value.ndim == 3 and value.shape[:2] == shape]
        can_leave_out = "logits_to_keep" in signature(fake.forward).parameters
        gradients = _gradient_pass(
            fake,
            layout,
            data,
            batch,
            max(by_token, default=0),
            can_leave_out=can_leave_out,
            weights=weights,
            offload=offload,
        )
    nbytes = sum(tensor.nbytes for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())
    blocks = []
    for name in layout.blocks:
        block, tally = model.get_submodule(name), passes[name]
        sites = tuple(_site_size(block, site, kept[site.name], is_free=is_free) for site in layout.of_block(name))
        own = sum(parameter.nbytes for parameter in block.parameters())
        element = next(block.parameters()).element_size()
        blocks.append(BlockSize(sites, own, element, tally.flops, tally.traffic, tally.peak))
    in_blocks = {id(value) for name in layout.blocks for value in model.get_submodule(name).parameters()}
    outside = [value for value in model.parameters() if id(value) not in in_blocks]
    return Workload(
        data=data,
        blocks=tuple(blocks),
        pre_norm=layout.is_pre_norm,
        nbytes=nbytes,
        largest_at_once=max([each.nbytes for each in blocks] + [value.nbytes for value in outside]),
        calls=calls,
        head_flops=max(whole.flops - of_blocks, 0.0),
        classes=max(by_token, default=0),
        can_leave_out=can_leave_out and bool(by_token),
        gradients=gradients,
    )


def _site_size(block: nn.Module, site: Site, units: int, *, is_free: bool) -> SiteSize:
    widest = units + ceil(UNEVEN * (site.units - units)) if is_free else units
    cut = {edge.module: edge.width * units for edge in site.producers}
    layers = {name: LayerView.of(block.get_submodule(name), name) for name in site.inputs}
    fed = [layer.size("in") for layer in layers.values()] or [layer_of(block, edge).size("in") for edge in site.producers]
    return SiteSize(
        kind=site.kind,
        channels=site.units * site.consumer.width,
        kept=units * site.consumer.width,
        widest=widest * site.consumer.width,
        out=site.out,
        fed=fed[0],
        produced=sum(cut.get(name, layer.size("out")) for name, layer in layers.items()),
        weights=site.parameters * site.units,
        is_normed=site.output_norm is not None,
        can_replay=site.sublayer is not None,
    )


def _block_passes(fake: nn.Module, base: nn.Module, layout: Layout, batch: Mapping[str, Any]) -> tuple[dict[str, Tally], int]:
    """One pass of every block, equal blocks once; and the bytes of how they are called."""
    store, passes, calls = ActivationStore(), {}, 0
    similar: dict[Any, Tally] = {}
    with torch.no_grad():
        before: list[nn.Module] = []
        for names in layout.stacks:
            blocks = [fake.get_submodule(name) for name in names]
            with Tally() as entry:
                record_block_calls(base, blocks, [batch], store, STREAM, encoder=before)
            hidden = store.get(STREAM, 0)
            calls += max(entry.held - hidden.nbytes, 0)
            for place, (name, block) in enumerate(zip(names, blocks, strict=True)):
                shapes = (layout.stack_of(name), *((key, each.shape) for key, each in block.named_parameters()))
                if shapes not in similar:
                    with Tally() as similar[shapes]:
                        run_block(block, hidden, store.get(calls_of(STREAM, len(before) + place), 0))
                passes[name] = similar[shapes]
            before += blocks
    return passes, calls


def _logits(returned: Any) -> list[Tensor]:
    """Of a model with a head; none of others."""
    return [value for name, value in returned.items() if name.endswith("logits") and isinstance(value, Tensor)]


def _gradient_pass(
    fake: nn.Module,
    layout: Layout,
    data: Data,
    batch: Mapping[str, Any],
    classes: int,
    *,
    can_leave_out: bool,
    weights: bool,
    offload: bool,
) -> Gradients:
    """One pass of `sensitivities`, or of `unit_gradients` where the gradients of weights are needed."""
    tokens, every, together = gradient_sample(data, classes, can_leave_out=can_leave_out, whole=weights)
    part = {
        name: value[:together] if isinstance(value, Tensor) and value.ndim and len(value) == data.batch_sequences else value
        for name, value in batch.items()
    }
    if every > 1:
        part["logits_to_keep"] = drawn(torch.arange(data.length)[None], every)[0]
    consumers = {site.name: fake.get_submodule(site.module) for site in (layout.sites if weights else layout.first_sites)}
    points = {name: Point(module, 0 if weights else None) for name, module in consumers.items()}
    every_weight = [
        fake.get_submodule(f"{s.block}.{edge.module}").get_parameter("weight") for s in layout.sites for edge in s.edges
    ]
    blocks = [fake.get_submodule(name) for name in layout.blocks]
    again = offload and not weights
    passes = recompute_blocks(blocks) if again else nullcontext()
    of_first = [] if again else [module.get_parameter("weight") for module in consumers.values()]
    for weight in every_weight if weights else of_first:
        weight.requires_grad_(True)
    with passes, Tally() as tally, torch.enable_grad():
        with capture_activations(points) as activations:
            returned = fake(**part)
            outputs = _logits(returned) or [returned[0]]
        forward = tally.flops
        loss = torch.stack([_sampled_loss(value, together) for value in outputs]).sum()
        wanted = [*activations.values(), *(every_weight if weights else [])]
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
        del gradients
    for weight in every_weight:
        weight.requires_grad_(False)
    return Gradients(
        tokens=tokens,
        passes=tokens / (together * data.length) * data.positions / data.tokens,
        forward=forward,
        backward=tally.flops - forward,
        traffic=tally.traffic,
        peak=tally.peak,
        entries=sum(_stream_bytes(block, together * data.length, layout) for block in blocks) if again else 0,
    )


def _stream_bytes(block: nn.Module, positions: int, layout: Layout) -> int:
    """Of what enters a block."""
    return next(block.parameters()).element_size() * positions * layout.sites[0].out


def gradient_sample(data: Data, classes: int, *, can_leave_out: bool, whole: bool) -> tuple[float, int, int]:
    """Tokens that gradients are taken of, every which position has an output, and sequences in a pass: as `fisher.sampled`."""
    if whole:
        return data.tokens, 1, data.batch_sequences
    most = (OUTPUTS, TEXTS) if classes else (TOKENS, SEQUENCES)
    tokens = data.tokens * min(max(most[0] / data.tokens, most[1] / data.sequences), 1.0)
    if not classes:
        return tokens, 1, data.batch_sequences
    every = max(int(tokens) // OUTPUTS, 1) if can_leave_out else 1
    return tokens, every, min(max(LOGITS * every // (data.length * classes), 1), data.batch_sequences)


def _sampled_loss(value: Tensor, sequences: int) -> Tensor:
    """As `sampled_label_loss` does it, but for the values."""
    if value.ndim == 3 and value.shape[-1] > 1:
        # As real tokens are taken: the way back has a copy of its own.
        kept = torch.arange(value.shape[0] * value.shape[1])
        rows = value.flatten(0, 1).index_select(0, kept).float().log_softmax(-1)
        for part in rows.detach().chunk(sequences):
            part.exp().cumsum(-1)
        return torch.nn.functional.nll_loss(rows, torch.zeros(len(rows), dtype=torch.int64), reduction="sum")
    return value.float().sum()


def kept_units(layout: Layout, keep: float, whole: Iterable[str | int] = ()) -> dict[str, int]:
    """Units that stay by site if all sites keep the same share, so that so much of the blocks' parameters stays."""
    protected: set[str | int] = set(whole)
    free = [site for site in layout.sites if site.name not in protected and site.layer not in protected]
    removable = sum(site.parameters * site.units for site in free)
    share = 1 - (1 - keep) * layout.parameters / max(removable, 1)
    share = min(max(share, 0.0), 1.0)
    cut = {site.name for site in free}
    return {site.name: max(round(share * site.units), 1) if site.name in cut else site.units for site in layout.sites}
