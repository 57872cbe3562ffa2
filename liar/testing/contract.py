"""The contract of a family, checked on a tiny random model of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from liar.mask import Mask
from liar.models import Layout, layout_of
from liar.testing.folder_checks import folder, generation, stock_folder
from liar.testing.run_checks import error, keep_all, repair, replay, selection
from liar.testing.state import expect
from liar.testing.table_checks import cut, shapes, sizes, streams
from liar.testing.tiny import tiny_batches


def check_family(model: nn.Module, batches: Sequence[Mapping[str, Tensor]] | None = None) -> Layout:
    """Check the table of a family on a tiny random model of it; raise an `AssertionError` that says what is wrong.

    It checks that the table names layers of consistent shapes in the order of the data; that consumer outputs are added to
    the named residual streams, in the declared order (pre-norm or post-norm, sequential or parallel); that cutting equals
    zeroing, with the right sizes on modules and in the configuration, for whole groups of heads and for query heads; that
    keeping everything changes no bit; that reconstruction brings the output nearer to the dense model's on new tokens; that
    the default criterion runs; that a cut model is saved and loaded, by the stock class where that can build it, and
    generates text with its cache as without; and that an error in the middle leaves the model as it was.

    Args:
        model: of a registered family; not changed. Several layers, heads and random biases make the check sharp.
        batches: at least two calibration batches with some hundred tokens each; random tokens if not given.

    Returns:
        The layout of the model.

    Raises:
        AssertionError: the family's table (or the model's class) breaks the contract; it names the field to look at.
        ModelError: the table names layers that the model does not have.

    Example:
        >>> from liar.testing import tiny_model
        >>> layout = check_family(tiny_model("bert", head="question-answering"))
        >>> layout.uncovered
        ()
    """
    if batches is None:
        batches = tiny_batches(model, batches=6, sequences=16, length=16)
    expect(len(batches) >= 2, "expected at least two batches: the last one is held out")
    batches = [dict(batch) for batch in batches]
    model = copy.deepcopy(model).train(False)
    model.to(torch.float32)
    layout = layout_of(model)
    mask = _some_mask(layout)
    masks = [mask, *([_some_queries(layout)] if any(site.by_query for site in layout.sites) else [])]
    with torch.no_grad():
        shapes(model, layout)
        streams(model, layout, batches)
        for each in masks:
            cut(model, layout, each, batches)
        sizes(model, layout)
        keep_all(model, layout, batches)
        replay(model, layout, mask, batches)
        selection(model, layout, mask, batches)
        for each in masks:
            repair(model, layout, each, batches)
            folder(model, each, batches[0])
            generation(model, each, batches[0])
        stock_folder(model, layout, batches[0])
    error(model, mask, batches)
    return layout


def _some_queries(layout: Layout) -> Mask:
    """Removes about half of the query heads of every group in even layers, and keeps one in odd ones; others in every group."""
    masks = {}
    for site in layout.counted_by("query").sites:
        if site.groups:
            unit, of_group = torch.arange(site.units), site.units // site.groups
            masks[site.name] = (unit + unit // of_group) % of_group < (1 if site.layer % 2 else max(1, of_group // 2))
    return Mask.of(masks, layout)


def _some_mask(layout: Layout) -> Mask:
    """Removes a half of the units in even layers and a third in odd ones, so that layers become unequal."""
    masks = {}
    for site in layout.sites:
        masks[site.name] = (torch.arange(site.units) + site.layer) % (2 + site.layer % 2) != 0
        masks[site.name][-1] = True
    return Mask(masks)
