"""The closed-form steps: refit producers, fit consumers to the residual stream, or fit them to the layer's own output.

On the residual stream, site after site on the pruned model's own activations, every site repairs what those before it left.
What a site should add is what the dense model's residual stream is after it, less what the pruned stream is before it
(K-prune's target; "global propagation" in Shin et al. 2024); by default a part of that. What the producers read has drifted as
well: they are first fitted to their dense output.

In deep pre-norm models the first token of a text is much larger than the others, which all attend to it (massive activations:
Sun et al. 2024). One layer makes it so, and it must do so after the repair, too. That is one token in hundreds, and the norm
before that layer makes its input as small as any other: so a refit weights tokens by how much the sublayer gives them. The
consumer's fit needs no weights: there, large tokens have large errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from liar.errors import ModelError, at_site
from liar.repair.captures import Capture
from liar.repair.context import RepairContext
from liar.repair.state import SiteState
from liar.repair.step import RepairStep
from liar.runtime import distributed, output_scale, widen
from liar.solve import damped_target, fit_drift
from liar.statistics import Folds, check_finite

# A refit reads so many tokens at most, or so many for each channel: with more, its answer is hardly better, and its sums take
# as much time as those of the consumer (benchmarks/README.md, "What a sample decides").
TOKENS = 32_768
ROWS = 80


class RefitProducers(RepairStep):
    """Fit the layers before the units, whose input has drifted, to what they give in the dense model.

    They are linear, so one regression of the old input on the new one serves them all.
    """

    captures = frozenset({"producer_input", "consumer_output"})

    def __init__(self, context: RepairContext) -> None:
        self.context = context

    def observe(self, site: SiteState, batch: int, dense: Mapping[str, Tensor]) -> None:
        """Keep what the producers read in the dense model, and how large the output is that comes of it."""
        site.put("producer input", batch, dense["producer_input"])
        if site.walk.layout.is_pre_norm:
            site.put("output size", batch, widen(dense["consumer_output"]).norm(dim=-1))

    def skip(self, site: SiteState) -> None:
        """Nothing has drifted."""
        self._discard(site)

    def before_cut(self, site: SiteState) -> None:
        """Where the whole layer runs, refit it whole."""
        if self.context.runs_whole(site):
            self._refit(site)

    def repair(self, site: SiteState) -> None:
        """Refit what is left of the producers elsewhere."""
        if not self.context.runs_whole(site):
            self._refit(site)

    def _refit(self, site: SiteState) -> None:
        """One regression for all producers, written into each."""
        if site.drifted:
            share = max(TOKENS, ROWS * site.producers[0].size("in")) / site.calibration.tokens
            folds = self.context.new_folds(site, share)
            weights = self._token_weights(site)
            for batch, pruned in site.run_pruned("producer_input"):
                with site.walk.timed("statistics"):
                    tokens = site.tokens(batch, share)
                    folds.update(pruned["producer_input"], site.get("producer input", batch), tokens, weights[batch])
            self.context.reduce(site, folds)
            self._write(site, *distributed.answer(partial(self._fit, site, folds)))
        self._discard(site)

    def _discard(self, site: SiteState) -> None:
        for series in ("producer input", "output size"):
            site.discard(series)

    def _token_weights(self, site: SiteState) -> list[Tensor | None]:
        """By batch, [sequences, length]: half of all weight is even, half in proportion to the size of the dense output.

        None in post-norm models, where a block's norm leaves no token larger than the others.
        """
        if not site.walk.layout.is_pre_norm:
            return [None for _ in site.walk.batches]
        return [1 + size for size in over_mean(site, [site.get("output size", batch) for batch in site.walk.batches])]

    def _fit(self, site: SiteState, folds: Folds) -> tuple[Tensor, Tensor]:
        """Weight and bias of all producers side by side: [in, out], [out]."""
        with site.walk.timed("solve"), at_site(site.name, site.site.module):
            layers, options = site.producers, self.context.options
            initial = [layer.initial_weights() for layer in layers]
            check_finite(*(value for pair in initial for value in pair), what="weights of its producers")
            weight, bias = (torch.cat(parts, -1) for parts in zip(*initial, strict=True))
            affine = all(layer.bias is not None for layer in layers)
            all_data, splits = folds.normals(affine=affine, channels=len(weight))
            return fit_drift(
                all_data,
                splits,
                weight,
                bias,
                ridge=options.ridge,
                solver=options.solver,
                enough=self.context.is_enough(site, len(weight)),
            )

    def _write(self, site: SiteState, weight: Tensor, bias: Tensor) -> None:
        widths = [layer.size("out") for layer in site.producers]
        parts = torch.split(weight, widths, 1), torch.split(bias, widths)
        for layer, part, offset in zip(site.producers, *parts, strict=True):
            layer.write(part, offset)


def over_mean(site: SiteState, sizes: Sequence[Tensor]) -> list[Tensor]:
    """Sizes of tokens, by batch [sequences, length], over their mean over all real tokens, those of all processes.

    Where the mean is zero, so are they.
    """
    pairs = zip(sizes, site.calibration.token_masks, strict=True)
    totals = distributed.gather(sum(float(size[mask].sum(dtype=torch.float64)) for size, mask in pairs))
    mean = sum(totals) / site.calibration.tokens
    return [size / max(mean, torch.finfo(size.dtype).tiny) for size in sizes]


class FitConsumer(RepairStep):
    """What all steps have that fit consumers and report it."""

    def __init__(self, context: RepairContext) -> None:
        self.context = context

    def finished(self, sites: Sequence[str]) -> dict[str, Any]:
        """What was reported of the sites."""
        return self.context.finished(sites)

    def restore(self, sites: Sequence[str], content: Mapping[str, Any]) -> None:
        """Report the sites as they were reported before."""
        self.context.restore(content)


class FitToResidualStream(FitConsumer):
    """Fit the consumer to what the residual stream of the pruned model still lacks.

    Where a norm comes between the two, no output of the consumer is the one that is lacking: it is fitted to its dense output.
    """

    captures = frozenset({"stream", "consumer_output"})

    def observe(self, site: SiteState, batch: int, dense: Mapping[str, Tensor]) -> None:
        """Keep the dense stream after the site, or what the consumer gives."""
        site.put("target", batch, dense["stream" if site.site.output_norm is None else "consumer_output"])

    def skip(self, site: SiteState) -> None:
        """The stream is the dense one."""
        site.discard("target")
        self.context.leave(site)

    def repair(self, site: SiteState) -> None:
        """Fit on the pruned stream; the sublayer need not run again afterwards."""
        folds = self.statistics(site)
        site.discard("target")
        self.context.fit_consumer(site, folds)

    def statistics(self, site: SiteState, *captures: Capture) -> Folds:
        """Of the kept channels on the pruned stream, with the target; `captures` are those that `rows` reads besides."""
        folds = self.context.new_folds(site)
        for batch, pruned in site.run_pruned("consumer_input", *captures, *residual_of(site)):
            with site.walk.timed("statistics"):
                kept, target = self.rows(site, batch, pruned)
                folds.update(kept, target, site.tokens(batch))
            site.keep_for_replay(batch, kept)
        return folds

    def rows(self, site: SiteState, batch: int, pruned: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The kept channels and the target of a batch: [sequences, length, kept], [sequences, length, out]."""
        return pruned["consumer_input"], self.lacking(site, batch, pruned)

    def lacking(self, site: SiteState, batch: int, pruned: Mapping[str, Tensor]) -> Tensor:
        """What the consumer should give, with the residual stream of the pruned model at hand."""
        target = widen(site.get("target", batch))
        if "residual" in pruned:
            target = target - pruned["residual"]
        if site.site.output_scale is not None:
            # What is multiplied by zero may be anything.
            scale = torch.as_tensor(output_scale(site.pruned_block, site.site))
            target = target / scale.where(scale != 0, 1)
        return target


def residual_of(site: SiteState) -> list[Capture]:
    """The capture of the residual stream, where the consumer is fitted to it."""
    return ["residual"] if site.site.output_norm is None else []


class FitToDampedStream(FitToResidualStream):
    """Fit the consumer to its own output, and to a damped part of what the stream has lost before it (see `fit_damped`).

    Its own output is what the layer gives with all its units. A feed-forward layer gives it on the pruned stream, once its
    producers are refitted, in the pass that gives its kept channels, too. Attention averages over tokens, so that its output
    hardly differs between the streams: what it gives in the dense model serves, and is there. So does what a teacher's layers
    give, of whichever kind: the model that it teaches may have been cut elsewhere.
    """

    def __init__(self, context: RepairContext) -> None:
        super().__init__(context)
        self.folds: Folds | None = None

    def observe(self, site: SiteState, batch: int, dense: Mapping[str, Tensor]) -> None:
        """Keep what the layer gives, too, where it does not run whole later."""
        super().observe(site, batch, dense)
        if not self.context.runs_whole(site):
            site.put("own output", batch, dense["consumer_output"])

    def skip(self, site: SiteState) -> None:
        """The stream is the dense one."""
        site.discard("own output")
        super().skip(site)

    def before_cut(self, site: SiteState) -> None:
        """Run the layer while it is whole."""
        if site.drifted and self.context.runs_whole(site):
            self.folds = self.statistics(site, "consumer_output")

    def repair(self, site: SiteState) -> None:
        """Fit to both; where nothing has drifted there is the own output only."""
        if not site.drifted:
            site.discard("own output")
            super().repair(site)
            return
        folds = self.statistics(site) if self.folds is None else self.folds
        self.folds = None
        for series in ("target", "own output"):
            site.discard(series)
        self.context.fit_consumer(site, folds, damped=True)

    def rows(self, site: SiteState, batch: int, pruned: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """As for all of the drift, with the damped target where there is any."""
        kept, target = super().rows(site, batch, pruned)
        if not site.drifted:
            return kept, target
        if not self.context.runs_whole(site):
            return kept, damped_target(widen(site.get("own output", batch)), target)
        channels = site.site.consumer.channels(site.unit_mask)
        return kept_channels(kept, channels), damped_target(widen(pruned["consumer_output"]), target)


def kept_channels(activations: Tensor, channels: Tensor) -> Tensor:
    """Some channels, [sequences, length, kept], of [sequences, length, channels]."""
    # `index_select` of the last of three dimensions takes twenty times as long.
    return activations.gather(2, channels.to(activations.device).expand(*activations.shape[:2], -1))


class FitToLayerOutput(FitConsumer):
    """Fit the consumer to its own dense output, on the dense model's activations: our reading of LIAR."""

    captures = frozenset({"consumer_input", "consumer_output"})

    def __init__(self, context: RepairContext) -> None:
        super().__init__(context)
        self.folds: dict[str, Folds] = {}
        self.waiting: list[SiteState] = []

    def observe(self, site: SiteState, batch: int, dense: Mapping[str, Tensor]) -> None:
        """Add a batch to the statistics of the kept channels."""
        if site.keeps_all:
            return
        if site.dense_site.units != site.site.units:
            raise ModelError(
                f"{site.name}: the teacher has {site.dense_site.units} units, the model {site.site.units}; with "
                "target='layer_output' both need the same: use target='damped_stream'"
            )
        with site.walk.timed("statistics"):
            if site.name not in self.folds:
                self.folds[site.name] = self.context.new_folds(site)
            z, t = dense["consumer_input"], dense["consumer_output"]
            kept = kept_channels(z, site.site.consumer.channels(site.unit_mask))
            self.folds[site.name].update(kept, t, site.tokens(batch))

    def skip(self, site: SiteState) -> None:
        """Everything is kept."""
        self.repair(site)

    def repair(self, site: SiteState) -> None:
        """At the last site of a block, fit all of them: none depends on another, so the processes take turns."""
        self.waiting.append(site)
        if site.site == site.block.sites[-1]:
            self._fit_all(site.block.number)
            self.waiting.clear()

    def _fit_all(self, block: int) -> None:
        cut = [site for site in self.waiting if not site.keeps_all]
        # A process without batches has seen none of them.
        folds = [self.folds.pop(site.name) if site.name in self.folds else self.context.new_folds(site) for site in cut]
        for site, own in zip(cut, folds, strict=True):
            self.context.reduce(site, own)
        solve = [partial(self.context.solve, site, own) for site, own in zip(cut, folds, strict=True)]
        found = dict(zip((site.name for site in cut), distributed.answers(solve, first=block), strict=True))
        for site in self.waiting:
            if site.keeps_all:
                self.context.leave(site)
            else:
                self.context.finish(site, *found[site.name])


def closed_form_steps(context: RepairContext) -> list[RepairStep]:
    """The steps of `liar.reconstruct` with some options, for `apply_steps`.

    Example:
        >>> from liar.options import ReconstructOptions
        >>> from liar.repair import RepairContext, closed_form_steps
        >>> context = RepairContext(ReconstructOptions(), advance=lambda: None)
        >>> [type(step).__name__ for step in closed_form_steps(context)]
        ['RefitProducers', 'FitToDampedStream']
    """
    if context.options.target == "layer_output":
        return [FitToLayerOutput(context)]
    refit: list[RepairStep] = [RefitProducers(context)] if context.options.refit else []
    fit = FitToDampedStream if context.options.target == "damped_stream" else FitToResidualStream
    return [*refit, fit(context)]
