"""From a closed-form rule to a smaller model: a repair step gathers the rows of every site and writes the rule's answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import liar
from benchmarks.baselines.apply import apply_step
from benchmarks.baselines.site_data import Need, Rule, SiteData
from liar.repair import Capture, RepairStep, SiteState

# What has to be captured for the rows that a rule needs: of the dense block, of the pruned block before its own site is cut,
# and of the pruned block after that.
DENSE: dict[Need, Capture] = {"dense_inputs": "consumer_input", "dense_sum": "stream"}
UNCUT: dict[Need, Capture] = {"inputs": "consumer_input"}
CUT: dict[Need, Capture] = {"kept_inputs": "consumer_input", "residual": "residual"}


def repair(model: nn.Module, mask: liar.Mask, calib: Sequence[Any], rule: Rule, *, teacher: nn.Module | None = None) -> None:
    """Cut the model and repair every site with the rule; the model gets smaller in place.

    With a teacher, what a rule sees as the dense stream is the teacher's.
    """
    has_pruned_stream = bool(rule.needs & {*UNCUT, *CUT})
    apply_step(model, mask, calib, ApplyRule(rule), has_pruned_stream=has_pruned_stream, teacher=teacher)


class ApplyRule(RepairStep):
    """Gather the rows that a rule needs at a site, and write its answer into the consumer."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        # The consumers before they are cut: those of the dense blocks are the teacher's.
        self.whole: dict[str, tuple[Tensor, Tensor]] = {}
        self.captures = frozenset(DENSE[need] for need in rule.needs if need in DENSE)

    def observe(self, site: SiteState, batch: int, dense: Mapping[str, Tensor]) -> None:
        """Keep the rows of the dense block."""
        for need, capture in self._needed(DENSE).items():
            self._keep(site, batch, need, dense[capture])

    def before_cut(self, site: SiteState) -> None:
        """Keep the consumer's weight, and what it reads on the pruned stream while its own site is whole."""
        self.whole[site.name] = site.consumer.initial_weights()
        self._run(site, self._needed(UNCUT))

    def repair(self, site: SiteState) -> None:
        """Solve, and write the answer."""
        self._run(site, self._needed(CUT))
        weight, bias = self.rule.solve(self._site_data(site))
        self._discard(site)
        consumer = site.consumer
        consumer.write(weight, consumer.initial_weights()[1] if bias is None else bias, create_bias=bias is not None)

    def skip(self, site: SiteState) -> None:
        """The site stays as it is."""
        self._discard(site)

    def _needed(self, captures: Mapping[Need, Capture]) -> dict[Need, Capture]:
        return {need: capture for need, capture in captures.items() if need in self.rule.needs}

    def _run(self, site: SiteState, captures: Mapping[Need, Capture]) -> None:
        if captures:
            for batch, values in site.run_pruned(*captures.values()):
                for need, capture in captures.items():
                    self._keep(site, batch, need, values[capture])

    def _keep(self, site: SiteState, batch: int, need: Need, value: Tensor) -> None:
        site.put(need, batch, value[site.calibration.token_masks[batch]])

    def _discard(self, site: SiteState) -> None:
        for need in self.rule.needs:
            site.discard(need)

    def _rows(self, site: SiteState, need: Need) -> Tensor:
        if need not in self.rule.needs:
            return torch.empty(0)
        return torch.cat([site.get(need, batch) for batch in site.walk.batches])

    def _site_data(self, site: SiteState) -> SiteData:
        """The rows of a site, its dense weights and which of its channels stay."""
        weight, bias = self.whole.pop(site.name)
        return SiteData(
            kind=site.site.kind,
            kept=site.site.consumer.channels(site.unit_mask),
            unit=torch.arange(int(site.unit_mask.sum())).repeat_interleave(site.site.consumer.width),
            weight=weight,
            bias=None if site.consumer.bias is None else bias,
            dense_inputs=self._rows(site, "dense_inputs"),
            inputs=self._rows(site, "inputs"),
            kept_inputs=self._rows(site, "kept_inputs"),
            dense_sum=self._rows(site, "dense_sum"),
            residual=self._rows(site, "residual"),
        )
