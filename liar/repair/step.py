"""What plugs into the walk over blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from liar.repair.captures import Capture
from liar.repair.state import SiteState


class RepairStep:
    """One thing that is done at every site. Override what is needed; everything else does nothing.

    Attributes:
        captures: what `observe` gets of the dense block.
        changes_all: whether it repairs sites too of which everything is kept and before which nothing has changed.

    Example:
        A step that only looks, and so needs no mask: the largest activation that each consumer reads.

        >>> from liar.repair import RepairStep, walk_blocks
        >>> class Largest(RepairStep):
        ...     captures = frozenset({"consumer_input"})
        ...     found = {}
        ...     def observe(self, site, batch, dense):
        ...         largest = dense["consumer_input"].abs().max().item()
        ...         self.found[site.name] = max(self.found.get(site.name, 0), largest)
        >>> step = Largest()
        >>> _ = walk_blocks(model, liar.discover(model), liar.Calibration.of(calib, model), [step])
        >>> sorted(step.found)
        ['heads.0', 'heads.1', 'neurons.0', 'neurons.1']
    """

    captures: frozenset[Capture] = frozenset()
    changes_all: bool = False

    def observe(self, site: SiteState, batch: int, dense: Mapping[str, Tensor]) -> None:
        """See one batch at a site of the dense block, [sequences, length, channels] by capture, before any site is cut.

        The tensors are those of the forward pass: do not change them in place.
        """

    def before_cut(self, site: SiteState) -> None:
        """Read the site when those before it are done and it is still whole.

        Its parameters are the user's yet: only `LayerView.write`, which replaces them, may change its layers.
        """

    def repair(self, site: SiteState) -> None:
        """Change the layers of the site, which is cut by now."""

    def finished(self, sites: Sequence[str]) -> dict[str, Any]:
        """What a run that goes on after a finished block has to know of its sites, by name: tensors, and what JSON can hold."""
        return {}

    def restore(self, sites: Sequence[str], content: Mapping[str, Any]) -> None:
        """Take what `finished` gave in an earlier run, in place of all the rest."""

    def skip(self, site: SiteState) -> None:
        """Run in place of `before_cut` and `repair` where everything is kept and nothing before the site has changed."""
