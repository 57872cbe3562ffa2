"""Masks in every form that `Mask.of` and `Mask.from_removed` take, and in forms that no one should give."""

from __future__ import annotations

import copy

import numpy as np
import torch
from hypothesis import example
from hypothesis import strategies as st
from strategies import INTEGERS, LEAVES, ODD, inputs
from unchanged import Refused, assert_runs, attempt

import liar
from liar import Mask
from liar.testing import tiny_model

MODELS = {name: tiny_model(name) for name in ("bert", "llama", "gpt2")}
LAYOUTS = {name: liar.discover(model) for name, model in MODELS.items()}
NAMES = sorted({
    name
    for layout in LAYOUTS.values()
    for site in layout.sites
    for name in ("heads", "neurons", site.name, site.module, *(f"{site.block}.{edge.module}" for edge in site.edges))
})  # fmt: skip
KINDS = [torch.bool, torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.uint8, torch.complex64]

SIZES = st.sampled_from([1, 2, 3, 4, 8, 64])
BOOLS = SIZES.flatmap(lambda size: st.lists(st.booleans(), min_size=size, max_size=size))
AS_ARRAYS = st.one_of(
    st.builds(lambda row, kind: torch.tensor(row).to(kind), BOOLS, st.sampled_from(KINDS)),
    BOOLS.map(np.array),
    BOOLS.map(lambda row: np.array(row, dtype=np.float64) * 0.5),
    BOOLS.map(lambda row: torch.tensor([row, row])),
)
INDICES = st.one_of(
    st.lists(st.integers(-1, 70), max_size=8),
    st.lists(st.integers(0, 3), max_size=4, unique=True),
    st.lists(INTEGERS, max_size=3),
    st.lists(st.one_of(st.integers(0, 3), LEAVES), max_size=4),
    st.sampled_from([range(8), range(4, 8), list(range(64)), [np.int64(1)], [True, 1], (0, 1), [[0], [1]]]),
)
ROWS = st.one_of(BOOLS, AS_ARRAYS, INDICES, ODD)
ENTRIES = st.dictionaries(
    st.one_of(st.sampled_from(NAMES), LEAVES.filter(lambda key: getattr(key, "__hash__", None) is not None)),
    st.one_of(
        ROWS,
        st.lists(ROWS, min_size=2, max_size=2),
        st.sampled_from([torch.ones(2, 4), torch.ones(2, 64, dtype=torch.bool), np.ones((2, 4)), torch.ones(2, 2, 4)]),
    ),
    max_size=3,
)
SOME_HEADS, SOME_NEURONS = (st.lists(st.integers(0, last), min_size=1, max_size=9, unique=True) for last in (1, 63))
USUAL = st.one_of(
    st.fixed_dictionaries({"heads": st.lists(SOME_HEADS, min_size=2, max_size=2)}, optional={"neurons.0": SOME_NEURONS}),
    st.dictionaries(st.sampled_from(["heads.0", "heads.1"]), SOME_HEADS),
    st.builds(
        lambda rows: {"neurons": torch.tensor(rows).view(2, 64) > 3}, st.lists(st.integers(0, 9), min_size=128, max_size=128)
    ),
)
MASKS = st.one_of(ENTRIES, ENTRIES, USUAL, ODD)


def made(make, layout=None):
    """What makes a mask gives a sound one, or refuses."""
    mask = attempt(make)
    if isinstance(mask, Refused):
        return mask
    assert Mask.from_json(mask.to_json()) == mask
    if layout is not None:
        assert list(mask.masks) == [site.name for site in layout.sites]
        for site in layout.sites:
            assert mask[site.name].dtype == torch.bool
            assert list(mask[site.name].shape) == [site.units]
            assert mask[site.name].any()
        assert Mask.of(mask, layout) == mask
        assert mask.parameters(layout) <= layout.parameters
    return mask


# a name that fills the screen
@example(name="bert", mask={"x" * 5000: [1]})
@inputs(120, name=st.sampled_from(list(MODELS)), mask=MASKS)
def test_of(name, mask):
    made(lambda: Mask.of(mask, LAYOUTS[name]), LAYOUTS[name])


@inputs(100, name=st.sampled_from(list(MODELS)), removed=st.dictionaries(st.sampled_from(NAMES), INDICES, max_size=3) | MASKS)
def test_from_removed(name, removed):
    made(lambda: Mask.from_removed(removed, LAYOUTS[name]), LAYOUTS[name])


@inputs(50, name=st.sampled_from(["bert", "llama"]), mask=MASKS)
def test_a_model_is_cut_or_stays(name, mask):
    model = copy.deepcopy(MODELS[name])
    if not isinstance(attempt(lambda: liar.remove(model, mask), model, changes=True), Refused):
        assert_runs(model, [2, 4, 32])


# not checked by the constructor
@example(mask=(), other={}, requested=None)
@example(mask={"heads.0": [True, False]}, other={}, requested=None)
# what cannot be written, or is read back as something else
@example(mask={}, other={}, requested=np.int8(1))
@example(mask={"heads.0": torch.ones(2, 4)}, other={}, requested=None)
@example(mask={None: torch.ones(4) > 0}, other={}, requested=None)
@inputs(60, mask=MASKS, other=MASKS, requested=ODD)
def test_a_mask_that_is_made_by_hand(mask, other, requested):
    one, another = made(lambda: Mask(mask, requested)), made(lambda: Mask(other))
    if isinstance(one, Refused):
        return
    for layout in LAYOUTS.values():
        made(lambda layout=layout: Mask.of(one, layout), layout)
    for combine in (Mask.__and__, Mask.__or__, Mask.overlap):
        attempt(lambda combine=combine: combine(one, another))
