"""Calibration batches of every form, and of forms that no model takes."""

from __future__ import annotations

import copy

import torch
from hypothesis import example
from hypothesis import strategies as st
from strategies import LEAVES, ODD, SCALARS, inputs
from torch.utils.data import DataLoader
from unchanged import Refused, assert_runs, attempt

import liar
from liar.testing import tiny_batches, tiny_model

MODELS = {
    "bert": tiny_model("bert"),
    "llama": tiny_model("llama", head="causal-lm"),
    "classifier": tiny_model("bert", head="sequence-classification", num_labels=3),
    "gpt2": tiny_model("gpt2", head="causal-lm"),
}
NAMES = st.sampled_from(list(MODELS))
GOOD = tiny_batches(MODELS["bert"], batches=2, sequences=4, length=8)


def _damaged(ids, places):
    """Ids with some of them replaced."""
    ids = ids.clone()
    for place, value in places:
        ids.view(-1)[place % ids.numel()] = value
    return ids


SIZES = st.integers(0, 5)
KINDS = st.sampled_from([torch.int64, torch.int32, torch.uint8, torch.float32, torch.bool, torch.complex64, torch.bfloat16])
SHAPES = st.lists(SIZES, max_size=4)
PLACES = st.lists(st.tuples(st.integers(0, 99), st.sampled_from([-1, 0, 95, 96, 2**31, -(2**63), 2**63 - 1])), max_size=2)
NUMBERS = st.lists(st.tuples(st.integers(0, 99), st.sampled_from([float("nan"), float("inf"), 1e38, -1e30, 0.0])), max_size=3)
IDS = st.one_of(
    st.builds(_damaged, st.sampled_from([batch["input_ids"] for batch in GOOD]), PLACES),
    st.builds(lambda shape, kind: torch.ones(shape).to(kind), SHAPES, KINDS),
    st.builds(
        lambda rows, length: torch.randint(0, 96, (rows, length), generator=torch.Generator().manual_seed(0)), SIZES, SIZES
    ),
)
EMBEDS = st.one_of(
    st.builds(lambda places: _damaged(torch.linspace(-1, 1, 4 * 8 * 32).view(4, 8, 32), places), NUMBERS),
    st.sampled_from([torch.zeros(4, 8, 32), torch.ones(4, 8, 31), torch.ones(4, 8), torch.ones(4, 8, 32).double()]),
)
FLAGS = st.one_of(
    st.sampled_from([GOOD[0]["attention_mask"], torch.zeros(4, 8), torch.ones(4, 8).bool(), torch.full((4, 8), float("nan"))]),
    st.lists(st.integers(-1, 2), min_size=32, max_size=32).map(lambda row: torch.tensor(row).view(4, 8)),
    st.builds(lambda shape, kind: torch.ones(shape).to(kind), SHAPES, KINDS),
)
LABELS = st.one_of(
    st.lists(st.sampled_from([0, 1, 2, 3, -1, -100, 2**62]), max_size=5).map(torch.tensor),
    st.sampled_from([GOOD[0]["input_ids"], torch.ones(4, 3), torch.full((4, 3), float("nan")), torch.full((4, 8), -100)]),
    st.builds(lambda shape, kind: torch.ones(shape).to(kind), SHAPES, KINDS),
)
VALUES = {
    "input_ids": IDS,
    "inputs_embeds": EMBEDS,
    "attention_mask": FLAGS,
    "labels": LABELS,
    "token_type_ids": FLAGS,
    "position_ids": IDS,
    "head_mask": FLAGS,
    "use_cache": st.booleans(),
    "output_hidden_states": st.booleans(),
    "return_dict": st.booleans(),
    "past_key_values": ODD,
    "unknown": ODD,
}
ENTRIES = st.lists(st.sampled_from(list(VALUES)), max_size=3, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: VALUES[name] | LEAVES for name in names})
)
BATCHES = st.one_of(
    ENTRIES.map(lambda entries: {**GOOD[0], **entries}),
    ENTRIES.map(lambda entries: {**GOOD[0], **entries}),
    ENTRIES.map(lambda entries: {"input_ids": GOOD[1]["input_ids"], **entries}),
    ENTRIES,
    IDS,
    st.dictionaries(SCALARS, LEAVES, max_size=2).map(lambda entries: {**GOOD[0], **entries}),
    ODD,
)
ROWS = st.lists(st.lists(st.integers(0, 99) | SCALARS, max_size=4) | SCALARS, max_size=3)
DATA = st.one_of(
    st.lists(BATCHES, max_size=3),
    st.lists(BATCHES, min_size=1, max_size=1).map(lambda batches: [*GOOD, *batches]),
    ROWS.map(lambda rows: [{"input_ids": rows}]),
    BATCHES,
)
# Ways to give the same. (A loader without its own generator draws from the global one.)
WAYS = {
    "plain": lambda data: data,
    "generator": lambda data: (batch for batch in data) if isinstance(data, list) else data,
    "loader": lambda data: DataLoader(data, batch_size=None, generator=torch.Generator()) if isinstance(data, list) else data,
    "tuple": lambda data: tuple(data) if isinstance(data, list) else data,
}
WAY = st.sampled_from(list(WAYS))


# no ids, but something in their place
@example(name="gpt2", way="plain", data={"input_ids": None, "inputs_embeds": torch.ones(2, 3, 32)})
# names that are not texts
@example(name="bert", way="plain", data=[{**GOOD[0], 3: 1, "x": 2}])
@example(name="bert", way="plain", data=[{**GOOD[0], None: 1}])
@example(name="bert", way="plain", data=[{None: 1, "": 2}])
@example(name="bert", way="plain", data=[{"x" * 5000: 1}])
# tensors that cannot be looked into
@example(name="bert", way="plain", data=[{**GOOD[0], "labels": torch.empty(3, device="meta")}])
@example(name="bert", way="plain", data=torch.empty(2, 3, device="meta").long())
@example(name="bert", way="plain", data=torch.ones(2, 3).to(torch.complex64))
@example(name="bert", way="plain", data=torch.ones(2, 0))
@inputs(150, name=NAMES, way=WAY, data=DATA)
def test_batches_are_checked(name, way, data):
    model = MODELS[name]
    calibration = attempt(lambda: liar.Calibration.of(WAYS[way](data), model), model)
    if not isinstance(calibration, Refused):
        assert calibration.tokens == sum(int(mask.sum()) for mask in calibration.token_masks) >= 1
        assert calibration.sequences == sum(len(mask) for mask in calibration.token_masks)


# a batch without sequences
@example(name="gpt2", way="plain", data=[*GOOD, torch.ones(0, 4).long()], criterion="magnitude")
@inputs(
    80, name=NAMES, way=WAY, data=DATA, criterion=st.sampled_from(["magnitude", "reconstruction", "wanda", "taylor", "fisher"])
)
def test_a_model_is_pruned_or_stays(name, way, data, criterion):
    model = copy.deepcopy(MODELS[name])
    how = {"keep": 0.5, "criterion": criterion, "progress": False}
    report = attempt(lambda: liar.prune(model, WAYS[way](data), **how), model, changes=True)
    if not isinstance(report, Refused):
        assert report.tokens >= 1
        assert_runs(model)
        assert all(value.isfinite().all() for value in model.state_dict().values())


@inputs(
    60, name=NAMES, way=WAY, data=DATA, criterion=st.sampled_from(["reconstruction", "fluctuation", "taylor", "fisher", "snip"])
)
def test_statistics(name, way, data, criterion):
    model = MODELS[name]
    statistics = attempt(lambda: liar.collect(model, WAYS[way](data), criteria=[criterion], progress=False), model)
    if not isinstance(statistics, Refused):
        assert all(value.isfinite().all() for values in statistics.sites.values() for value in values.values())
        mask = attempt(lambda: liar.select(model, statistics, keep=0.5, criterion=criterion), model)
        assert isinstance(mask, liar.Mask)
    attempt(lambda: liar.moments(model, WAYS[way](data), progress=False), model)


def test_a_loader_leaves_the_random_state():
    """Each pass over a DataLoader draws from the global random state, for its workers."""
    model = copy.deepcopy(MODELS["bert"])
    loader = DataLoader(GOOD, batch_size=None, shuffle=True)
    attempt(lambda: liar.prune(model, loader, keep=0.5, criterion="wanda", progress=False), model, changes=True)
