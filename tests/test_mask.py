"""Every format a mask may come in, every message, and the way to JSON and back."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from liar import Mask
from liar.errors import MaskError
from liar.models import layout_of
from liar.testing import tiny_model

BERT = layout_of(tiny_model("bert"))
HEADED = layout_of(tiny_model("bert", head="sequence-classification"))
GROUPED = layout_of(tiny_model("llama", num_attention_heads=8, num_key_value_heads=2))
FUSED = layout_of(tiny_model("gpt2"))

ROWS = [[True, False, True, True], [False, True, False, False]]
INDICES = [[0, 2, 3], [1]]


def assert_rows(mask, rows=ROWS, kind="heads"):
    for layer, row in enumerate(rows):
        assert mask[f"{kind}.{layer}"].tolist() == row
        assert mask[f"{kind}.{layer}"].dtype == torch.bool


@pytest.mark.parametrize(
    "entries",
    [
        {"heads": torch.tensor(ROWS)},
        {"heads": torch.tensor(ROWS).float()},
        {"heads": torch.tensor(ROWS).to(torch.int64)},
        {"heads": torch.tensor(ROWS).to(torch.bfloat16)},
        {"heads": np.array(ROWS)},
        {"heads": np.array(ROWS, dtype=np.float32)},
        {"heads": np.array(ROWS, dtype=np.uint8)},
        {"heads": ROWS},
        {"heads": tuple(tuple(row) for row in ROWS)},
        {"heads": [list(np.array(row)) for row in ROWS]},
        {"heads": INDICES},
        {"heads": [[3, 0, 2], (1,)]},
        {"heads": [[np.int64(0), np.int32(2), 3], [1]]},
        {"heads": [torch.tensor(row) for row in ROWS]},
        {"heads": [torch.tensor(ROWS[0]), INDICES[1]]},
        {"heads.0": INDICES[0], "heads.1": torch.tensor(ROWS[1])},
        {"encoder.layer.0.attention.output.dense": ROWS[0], "encoder.layer.1.attention.output.dense": INDICES[1]},
        Mask({"heads.0": torch.tensor(ROWS[0]), "heads.1": torch.tensor(ROWS[1])}),
    ],
    ids=lambda entries: type(entries).__name__,
)
def test_formats(entries):
    mask = Mask.of(entries, BERT)
    assert_rows(mask)
    # Sites that are not named stay whole.
    assert all(mask.keeps_all(f"neurons.{layer}") for layer in range(2))
    assert list(mask.masks) == [site.name for site in BERT.sites]


def test_names_of_a_model_with_a_head():
    name = "bert.encoder.layer.0.attention.output.dense"
    mask = Mask.of({name: ROWS[0]}, HEADED)
    assert mask["heads.0"].tolist() == ROWS[0]
    # The same site names fit both, so one mask serves a model with any head.
    assert Mask.of(mask, BERT) == mask


def test_kinds_may_be_mixed():
    mask = Mask.of({"heads": ROWS, "neurons.1": [5]}, BERT)
    assert_rows(mask)
    assert (mask.kept("neurons.0"), mask.kept("neurons.1")) == (64, 1)


def test_an_empty_mapping_keeps_everything():
    mask = Mask.of({}, BERT)
    assert all(mask.keeps_all(site.name) for site in BERT.sites)
    assert mask.parameters(BERT) == BERT.parameters


def test_the_requested_share_is_carried():
    mask = Mask({"heads.0": torch.tensor(ROWS[0])}, requested=0.5)
    assert Mask.of(mask, BERT).requested == 0.5
    assert Mask.of({"heads": ROWS}, BERT).requested is None


def test_masks_of_kwon():
    """`head_mask` and `neuron_mask` are float32 tensors of 0.0 and 1.0; tuned ones hold scales."""
    head_mask, neuron_mask = torch.tensor(ROWS).float(), torch.ones(2, 64)
    neuron_mask[1, 3] = 0.0
    mask = Mask.of({"heads": head_mask, "neurons": neuron_mask}, BERT)
    assert_rows(mask)
    assert_rows(mask, neuron_mask.bool().tolist(), "neurons")
    tuned = head_mask * 1.3
    assert_rows(Mask.of({"heads": tuned != 0}, BERT))
    with pytest.raises(MaskError, match=r"exactly 0 or 1, got torch\.float32"):
        Mask.of({"heads": tuned}, BERT)


# Grouped-query attention: 8 query heads share 2 key and value heads


def test_key_value_heads_or_query_heads():
    units = Mask.of({"heads": [[True, False], [True, True]]}, GROUPED)
    queries = Mask.of({"heads": torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0], [1] * 8])}, GROUPED)
    assert units == queries
    assert units["heads.0"].tolist() == [True, False]


def test_a_mixed_group_is_named():
    with pytest.raises(MaskError, match=r"heads\.1 .*the query heads of a group share .*in all 2 groups, got 3, 0"):
        Mask.of({"heads": torch.tensor([[1] * 8, [1, 0, 1, 1, 0, 0, 0, 0]])}, GROUPED)


def test_indices_are_units():
    assert Mask.of({"heads.0": [1]}, GROUPED)["heads.0"].tolist() == [False, True]
    with pytest.raises(MaskError, match="from 0 to 1, got 7"):
        Mask.of({"heads.0": [7]}, GROUPED)


def test_wrong_width_names_both_possibilities():
    with pytest.raises(MaskError, match=r"expected shape \[2\] \(or 8 query heads\), got \[4\]"):
        Mask.of({"heads.0": torch.ones(4)}, GROUPED)


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        (
            {"heads": torch.ones(2, 3)},
            r"heads\.0 \(encoder\.layer\.0\.attention\.output\.dense\): expected shape \[4\], got \[3\]",
        ),
        ({"heads": torch.ones(1, 4)}, r"mask\['heads'\]: expected one row for each of 2 layers, got 1"),
        ({"heads": torch.ones(2, 4, 1)}, r"expected shape \[4\], got \[4, 1\]"),
        ({"heads": torch.ones(2)}, r"expected shape \[4\], got \[\]"),
        ({"heads": torch.tensor(1)}, "expected one row for each of 2 layers"),
        ({"heads": np.array(1)}, "expected one row for each of 2 layers, got ndarray"),
        ({"heads": None}, "expected one row for each of 2 layers, got NoneType"),
        ({"heads": True}, "expected one row for each of 2 layers"),
        ({"heads": {}}, "expected one row for each of 2 layers"),
        ({"heads": [None, [0]]}, "expected a bool tensor or a list of kept indices, got NoneType"),
        ({"heads": [object(), [0]]}, "expected a bool tensor or a list of kept indices, got object"),
        (
            {"heads": torch.full((2, 4), 0.5)},
            r"heads\.0 .*exactly 0 or 1, got torch\.float32 with values 0\.5.*threshold your scores",
        ),
        ({"heads": torch.full((2, 4), float("nan"))}, "exactly 0 or 1"),
        ({"heads": torch.full((2, 4), 2)}, "exactly 0 or 1, got torch.int64"),
        ({"heads": torch.zeros(2, 4)}, r"heads\.0 .*nothing is kept; keep at least one of 4 units$"),
        ({"heads": [[0], []]}, r"heads\.1 .*nothing is kept"),
        ({"heads": [[False] * 4, [0]]}, r"heads\.0 .*nothing is kept"),
        ({"heads": [[0, 0], [1]]}, "each once and from 0 to 3, got 0, 0"),
        ({"heads": [[1, 0, 1, 1], [1]]}, "read as kept indices.*for a 0/1 mask pass a tensor or an array"),
        ({"heads": [[-1], [1]]}, "from 0 to 3, got -1"),
        ({"heads": [[4], [1]]}, "from 0 to 3, got 4"),
        ({"heads": [[0.5], [1]]}, r"a list must hold kept indices \(integers\) or bools, got 0\.5"),
        ({"heads": [["0"], [1]]}, "a list must hold kept indices"),
        ({"heads": ["0", "1"]}, "a list must hold kept indices"),
        ({"heads.2": [0]}, r"mask\['heads\.2'\]: no such site in this model; expected .*Sites: heads\.0, "),
        ({0: [0]}, r"mask\[0\]: no such site"),
        ({"encoder.layer.0.output": [0]}, "no such site"),
        ({"heads.0": [0], "heads": torch.ones(2, 4)}, r"mask\['heads\.0'\] and mask\['heads'\] both say what heads\.0 keeps"),
        (
            {"neurons.1": [0], "encoder.layer.1.output.dense": [0]},
            r"mask\['neurons\.1'\] and mask\['encoder\.layer\.1\.output\.dense'\] both say what neurons\.1 keeps",
        ),
        (torch.ones(2, 4), "expected .*got a Tensor"),
        ([[0], [1]], "expected .*got a list"),
        (None, "got a NoneType"),
        ("mask.json", r"got a str \(liar\.Mask\.load reads a file\)"),
        (Mask({"heads.9": torch.ones(4, dtype=torch.bool)}), r"mask\['heads\.9'\]: no such site"),
    ],
)  # fmt: skip
def test_messages(entries, says):
    with pytest.raises(MaskError, match=says):
        Mask.of(entries, BERT)


def masks():
    """Any mask of the tiny BERT that keeps something everywhere."""
    row = {site.name: st.lists(st.booleans(), min_size=site.units, max_size=site.units).filter(any) for site in BERT.sites}
    rows = st.fixed_dictionaries(row)
    requested = st.none() | st.floats(0.01, 1)
    return st.builds(lambda kept, share: Mask({name: torch.tensor(r) for name, r in kept.items()}, share), rows, requested)


@given(mask=masks())
def test_json_goes_round(mask):
    again = Mask.from_json(mask.to_json())
    assert again == mask
    assert again.requested == mask.requested


@given(mask=masks())
def test_every_format_of_a_mask_gives_that_mask(mask):
    heads = torch.stack([mask[f"heads.{layer}"] for layer in range(2)])
    neurons = torch.stack([mask[f"neurons.{layer}"] for layer in range(2)])
    formats = [
        mask,
        mask.masks,
        {"heads": heads, "neurons": neurons},
        {"heads": heads.numpy(), "neurons": neurons.double()},
        {kind: [row.nonzero().flatten().tolist() for row in rows] for kind, rows in (("heads", heads), ("neurons", neurons))},
        {BERT[name].module: row.tolist() for name, row in mask.masks.items()},
    ]
    for entries in formats:
        assert Mask.of(entries, BERT) == mask


@given(mask=masks())
def test_counts(mask):
    removed = 0
    for site in BERT.sites:
        assert mask.kept(site.name) == sum(mask[site.name].tolist())
        assert mask.keeps_all(site.name) == (mask.kept(site.name) == site.units)
        removed += site.parameters * (site.units - mask.kept(site.name))
    assert mask.parameters(BERT) == BERT.parameters - removed


# Two masks


def units(mask):
    """Site name -> set of kept units."""
    return {name: set(row.nonzero().flatten().tolist()) for name, row in mask.masks.items()}


@given(first=masks(), second=masks())
def test_either_is_the_union(first, second):
    either = first | second
    assert units(either) == {name: kept | units(second)[name] for name, kept in units(first).items()}
    assert either == second | first
    assert either.requested is None
    assert first & either == first


@given(first=masks(), other=masks(), shared=masks())
def test_both_is_the_intersection(first, other, shared):
    # Masks that have at least `shared` in common.
    first, second = first | shared, other | shared
    both = first & second
    assert units(both) == {name: kept & units(second)[name] for name, kept in units(first).items()}
    assert both == second & first
    assert both.requested is None
    assert both | first == first


@given(mask=masks(), name=st.sampled_from([site.name for site in BERT.sites]))
def test_nothing_in_common_is_refused(mask, name):
    first, second = (torch.arange(BERT[name].units) < 2, torch.arange(BERT[name].units) >= 2)
    with pytest.raises(MaskError, match=f"keeps nothing at {name}; keep at least one"):
        Mask({**mask.masks, name: first}) & Mask({**mask.masks, name: second})


@given(first=masks(), second=masks())
def test_overlap_is_that_of_the_kept_sets(first, second):
    result = first.overlap(second)
    assert result == second.overlap(first)
    assert list(result) == list(first.masks)
    for name, kept in units(first).items():
        other = units(second)[name]
        assert result[name] == len(kept & other) / len(kept | other)
        assert (result[name] == 1) == (kept == other)


@given(mask=masks())
def test_a_mask_with_itself(mask):
    assert mask & mask == mask | mask == mask
    assert mask.overlap(mask) == dict.fromkeys(mask.masks, 1.0)


def test_shared_key_and_value_heads_are_compared_by_units():
    first = Mask.of({"heads": torch.tensor([[1] * 4 + [0] * 4, [1] * 8])}, GROUPED)
    second = Mask.of({"heads": [[0, 1], [1]]}, GROUPED)
    assert (first & second) == Mask.of({"heads": [[0], [1]]}, GROUPED)
    assert (first | second) == Mask.of({}, GROUPED)
    assert first.overlap(second) == {"heads.0": 0.5, "neurons.0": 1.0, "heads.1": 0.5, "neurons.1": 1.0}


def test_the_order_of_the_sites_does_not_matter():
    first, second = Mask.of({"heads": ROWS}, BERT), Mask.of({"heads": [[0], [1]]}, BERT)
    reordered = Mask(dict(reversed(second.masks.items())))
    assert first & reordered == first & second
    assert list(first.overlap(reordered)) == list(first.masks)


def test_both_leave_the_masks_alone():
    first, second = Mask.of({"heads": ROWS}, BERT), Mask.of({"heads": [[0], [1]]}, BERT)
    before = units(first), units(second)
    (first & second)["heads.0"][:] = True
    (first | second)["heads.0"][:] = False
    assert (units(first), units(second)) == before


def test_nothing_in_common_names_the_sites():
    first, second = Mask.of({"heads": [[0], [0]]}, BERT), Mask.of({"heads": [[1], [0, 1]]}, BERT)
    with pytest.raises(MaskError, match=r"mask & mask keeps nothing at heads\.0; keep at least one unit of every site"):
        first & second
    assert first.overlap(second)["heads.0"] == 0
    with pytest.raises(MaskError, match=r"keeps nothing at heads\.0, heads\.1;"):
        first & Mask.of({"heads": [[1], [2]]}, BERT)


def test_two_empty_sites_are_the_same_choice():
    empty = Mask({"heads.0": torch.zeros(3, dtype=torch.bool)})
    assert empty.overlap(empty) == {"heads.0": 1.0}


@pytest.mark.parametrize("join", [Mask.__and__, Mask.__or__, Mask.overlap], ids=["both", "either", "overlap"])
@pytest.mark.parametrize(
    ("other", "says"),
    [
        (Mask({"heads.0": torch.ones(3) > 0}),
         r"heads\.0: expected bool of one size .*, got torch\.bool \[4\] and torch\.bool \[3\]; see Mask\.of"),
        (Mask({"heads.1": torch.ones(4) > 0}), r"heads\.0: .* got torch\.bool \[4\] and no such site"),
        (Mask({"heads.0": torch.ones(4) > 0, "heads.1": torch.ones(4) > 0}),
         r"heads\.1: .* got no such site and torch\.bool \[4\]"),
        (Mask({}), r"heads\.0: .* and no such site"),
        ({"heads.0": [0]}, r"expected two masks, got a Mask and a dict; see Mask\.of\(mask, layout\)"),
        (None, "expected two masks, got a Mask and a NoneType"),
    ],
)  # fmt: skip
def test_masks_that_do_not_belong_together(join, other, says):
    with pytest.raises(MaskError, match=says):
        join(Mask({"heads.0": torch.tensor(ROWS[0])}), other)


# Index lists of removed units


QUERY, OUTPUT = "encoder.layer.0.attention.self.query", "encoder.layer.0.attention.output.dense"


@given(mask=masks())
def test_removed_units_are_those_that_are_not_kept(mask):
    removed = {name: (~row).nonzero().flatten().tolist() for name, row in mask.masks.items()}
    assert Mask.from_removed(removed, BERT) == mask
    for number in range(4):
        # By every layer of a site in turn: the producers, of which neurons have one only, and the consumer.
        by_layer = {}
        for site in BERT.sites:
            edge = [*site.producers, site.consumer][number % (len(site.producers) + 1)]
            by_layer[f"{site.block}.{edge.module}"] = edge.channels(~mask[site.name]).tolist()
        result = Mask.from_removed(by_layer, BERT)
        assert result == mask
        assert result.requested is None


def test_sites_that_are_not_named_stay_whole():
    assert Mask.from_removed({}, BERT) == Mask.of({}, BERT)
    mask = Mask.from_removed({"neurons.1": (5, np.int64(0)), "heads.0": range(2), "heads.1": []}, BERT)
    assert mask == Mask.of({"neurons.1": [n for n in range(64) if n not in (0, 5)], "heads.0": [2, 3]}, BERT)


def test_names_of_layers_are_full_names():
    inside = Mask.from_removed({f"bert.{QUERY}": list(range(8))}, HEADED)
    assert inside == Mask.from_removed({QUERY: list(range(8))}, BERT) == Mask.of({"heads.0": [1, 2, 3]}, BERT)
    with pytest.raises(MaskError, match="expected the name of a site"):
        Mask.from_removed({QUERY: [0]}, HEADED)


def test_shared_key_and_value_heads_go_with_their_query_heads():
    """Heads have 4 channels: a unit is 16 channels of q_proj and o_proj, 4 of k_proj and v_proj."""
    wide, narrow = list(range(16, 32)), list(range(4, 8))
    layers = {"q_proj": wide, "k_proj": narrow, "v_proj": narrow, "o_proj": wide}
    lists = {f"layers.0.self_attn.{name}": indices for name, indices in layers.items()}
    expected = Mask.of({"heads.0": [0]}, GROUPED)
    for name, indices in lists.items():
        assert Mask.from_removed({name: indices}, GROUPED) == expected
    assert Mask.from_removed({**lists, "heads.0": [1]}, GROUPED) == expected
    with pytest.raises(MaskError, match=r"unit 1 of heads\.0 is channels 16 to 31 of this layer, got 4 of them$"):
        Mask.from_removed({"layers.0.self_attn.q_proj": list(range(16, 20))}, GROUPED)
    with pytest.raises(MaskError, match="each once and from 0 to 7, got 16, 17"):
        Mask.from_removed({"layers.0.self_attn.k_proj": wide}, GROUPED)


def fused_channels(*heads):
    """Output channels of the tiny GPT-2's `c_attn`: query, key and value of a head, 8 channels each, 32 apart."""
    return [part * 32 + head * 8 + channel for part in range(3) for head in heads for channel in range(8)]


def test_a_fused_layer_has_three_ranges_of_channels_per_unit():
    expected = Mask.of({"heads.0": [0, 2]}, FUSED)
    lists = {"h.0.attn.c_attn": fused_channels(1, 3), "h.0.attn.c_proj": [*range(8, 16), *range(24, 32)], "heads.0": [1, 3]}
    for name, indices in lists.items():
        assert Mask.from_removed({name: indices}, FUSED) == expected
    assert Mask.from_removed({**lists, "h.0.attn.c_attn": fused_channels(3, 1)[::-1]}, FUSED) == expected
    assert Mask.from_removed({"h.1.mlp.c_fc": [5], "h.1.mlp.c_proj": [5]}, FUSED).kept("neurons.1") == 127


@pytest.mark.parametrize(
    ("indices", "says"),
    [
        # Only the query of head 1: its key and its value are missing.
        (list(range(8, 16)),
         r"all 24 channels of a unit go or stay together; unit 1 of heads\.0 is channels 8 to 15, 40 to 47, 72 to 79 of this "
         "layer, got 8 of them$"),
        # Everything but one channel of the value of head 2.
        (fused_channels(2)[:-1], r"unit 2 of heads\.0 is channels 16 to 23, 48 to 55, 80 to 87 of this layer, got 23 of them$"),
        # As if the channels of a unit lay together.
        (list(range(24)), r"got 8 of them; units 0, 1, 2 are mixed$"),
        ([96], "each once and from 0 to 95, got 96"),
        (list(range(96)), r"removed\['h\.0\.attn\.c_attn'\] of heads\.0: nothing is kept"),
    ],
)  # fmt: skip
def test_parts_of_a_unit_of_a_fused_layer(indices, says):
    with pytest.raises(MaskError, match=says):
        Mask.from_removed({"h.0.attn.c_attn": indices}, FUSED)


@given(kept=st.lists(st.booleans(), min_size=4, max_size=4).filter(any))
def test_any_choice_of_heads_of_a_fused_layer(kept):
    removed = fused_channels(*(head for head in range(4) if not kept[head]))
    mask = Mask.from_removed({"h.1.attn.c_attn": removed}, FUSED)
    assert mask["heads.1"].tolist() == kept
    assert FUSED["heads.1"].producers[0].channels(~mask["heads.1"]).tolist() == sorted(removed)


@pytest.mark.parametrize(
    ("removed", "says"),
    [
        ({"heads.0": [4]}, r"removed\['heads\.0'\]: expected removed indices, each once and from 0 to 3, got 4$"),
        ({"heads.0": [1, -1]}, "from 0 to 3, got -1$"),
        ({"heads.0": [1, 1, 2]}, "each once and from 0 to 3, got 1$"),
        ({QUERY: [32]}, r"removed\['encoder.*query'\]: .* from 0 to 31, got 32$"),
        ({QUERY: [0, 8, 9]},
         r"all 8 channels of a unit go or stay together; unit 0 of heads\.0 is channels 0 to 7 of this layer, got 1 of them; "
         r"units 0, 1 are mixed$"),
        ({"heads.0": [0, 1, 2, 3]}, r"removed\['heads\.0'\] of heads\.0: nothing is kept; keep at least one of 4 units"),
        ({OUTPUT: list(range(32))}, r"removed\['encoder.*dense'\] of heads\.0: nothing is kept"),
        ({"heads.0": 1}, "expected a list of removed indices, got a int"),
        ({"heads.0": "1"}, "expected a list of removed indices, got a str"),
        ({"heads.0": torch.tensor([1])}, r"got a Tensor; arrays have \.tolist\(\)"),
        ({"heads.0": ROWS[0]}, r"a list must hold removed indices \(integers\), got True, False"),
        ({"heads.0": [0.0]}, r"a list must hold removed indices \(integers\), got 0\.0"),
        ({"heads": [[0], [1]]},
         r"removed\['heads'\]: expected the name of a site, or the full name of a layer .* heads\.0, encoder\."),
        ({"encoder.layer.0": [0]}, "expected the name of a site"),
        ([[0]], r'expected \{"neurons\.0": .*got a list'),
        (Mask({"heads.0": torch.ones(4) > 0}), "got a Mask"),
        ({QUERY: list(range(8)), OUTPUT: list(range(8, 16))},
         r"removed\['.*query'\] and removed\['.*dense'\] both belong to heads\.0 and must remove the same units, "
         r"got units \[0\] and \[1\]"),
        ({"heads.0": [0, 1], QUERY: list(range(8))}, r"got units \[0, 1\] and \[0\]"),
        ({"heads.0": [], QUERY: list(range(8))}, r"got units \[\] and \[0\]"),
    ],
)  # fmt: skip
def test_messages_of_index_lists(removed, says):
    with pytest.raises(MaskError, match=says):
        Mask.from_removed(removed, BERT)


def test_files(tmp_path):
    mask = Mask.of({"heads": ROWS}, BERT)
    mask.save(tmp_path / "mask.json")
    assert Mask.load(tmp_path / "mask.json") == mask


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[1]", '{"mask": 3}', '{"mask": {"heads.0": {"units": 2}}}', '{"mask": {"heads.0": {"units": 2, "kept": [5]}}}',
     '{"mask": {"heads.0": {"units": "x", "kept": [0]}}}', '{"mask": {"heads.0": {"units": -2, "kept": []}}}',
     '{"mask": {"heads.0": {"units": 2, "kept": [-1]}}}', '{"mask": {"heads.0": {"units": 2, "kept": [true]}}}'],
)  # fmt: skip
def test_broken_json(text):
    with pytest.raises(MaskError, match=r'expected a JSON with \{"mask"'):
        Mask.from_json(text)


def test_a_mask_is_frozen_and_owns_its_tensors():
    row = torch.tensor(ROWS[0])
    mask = Mask({"heads.0": row})
    row[:] = False
    assert mask.kept("heads.0") == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        mask.requested = 1.0


def test_equality_sees_every_bit():
    mask = Mask.of({"heads": ROWS}, BERT)
    assert mask == Mask.of({"heads": INDICES}, BERT)
    assert mask != Mask.of({"heads": [[0, 2], [1]]}, BERT)
    assert mask != Mask({"heads.0": torch.tensor(ROWS[0])})
    assert mask != "mask"
