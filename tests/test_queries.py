"""Query heads as units, where several share a key and value head: equally many stay in every group."""

import copy
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import liar
from liar.errors import BudgetError, CalibrationError, MaskError, OptionError
from liar.models import layout_of
from liar.options import TARGETS
from liar.selection import CRITERIA
from liar.selection.queries import best_of_groups, by_rank, rank_scores
from liar.testing import assert_same_state, model_state, tiny_batches, tiny_model

GROUPS, OF_GROUP = 2, 4


@pytest.fixture
def model():
    return tiny_model("llama", head="causal-lm", num_attention_heads=GROUPS * OF_GROUP, head_dim=8)


@pytest.fixture
def batches(model):
    return tiny_batches(model, batches=6, sequences=16)


def rows(mask):
    return {name: row for name, row in mask.masks.items() if name.startswith("heads")}


def of_groups(row):
    """How many heads each group keeps; where all stay, a mask has a number for each group only."""
    return row.view(GROUPS, OF_GROUP).sum(1).tolist() if len(row) > GROUPS else [OF_GROUP] * GROUPS


@pytest.mark.parametrize("widths", ["free", "balanced", "uniform"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_group_keeps_equally_many(criterion, widths, model, batches):
    labelled = [{**batch, "labels": batch["input_ids"]} for batch in batches]
    mask = liar.select(model, labelled, keep=0.6, criterion=criterion, widths=widths, heads="query", progress=False)
    layout = layout_of(model)
    assert 0.5 < mask.parameters(layout) / layout.parameters <= 0.6
    for row in rows(mask).values():
        one, other = of_groups(row)
        assert one == other >= 1
    if widths == "uniform":
        assert len({tuple(of_groups(row)) for row in rows(mask).values()}) == 1


def test_what_is_counted_is_what_is_left(model):
    before = sum(parameter.numel() for parameter in model.parameters())
    layout = layout_of(model)
    mask = liar.select(model, keep=0.7, criterion="magnitude", heads="query", round_to=8)
    liar.remove(model, mask)
    left = sum(parameter.numel() for parameter in model.parameters())
    assert before - left == layout.parameters - mask.parameters(layout)
    assert layout_of(model).parameters == mask.parameters(layout)
    assert {layer.self_attn.k_proj.out_features for layer in model.model.layers} == {GROUPS * 8}


def test_flops_count_what_stays(model):
    layout = layout_of(model)
    mask = liar.select(model, keep=0.7, criterion="magnitude", heads="query", budget="flops")
    dense = liar.flops(model).dense
    liar.remove(model, mask)
    assert 0.6 < liar.flops(model).dense / dense <= 0.7
    assert layout.parameters > layout_of(model).parameters


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(0, 1000))
def test_the_best_of_every_group_stay(groups, of_group, count, seed):
    site = layout_of(tiny_model("llama", num_attention_heads=8, head_dim=8)).counted_by("query").sites[0]
    layout = layout_of(tiny_model("llama", num_attention_heads=8, head_dim=8)).counted_by("query")
    scores = torch.rand(site.units, generator=torch.Generator().manual_seed(seed))
    count = min(count, site.units // site.groups)
    everything = {each.name: torch.ones(each.units, dtype=torch.bool) for each in by_rank(layout).sites}
    ranks = liar.Mask({**everything, site.name: torch.arange(site.units // site.groups) < count})
    kept = best_of_groups(ranks, {each.name: torch.rand(each.units) for each in layout.sites} | {site.name: scores}, layout)
    for group, chosen in zip(scores.view(site.groups, -1), kept[site.name].view(site.groups, -1), strict=True):
        assert sorted(group[chosen].tolist()) == sorted(group.tolist())[-count:]
    by_hand = [sum(sorted(group.tolist())[-1 - rank] for group in scores.view(site.groups, -1)) for rank in range(OF_GROUP)]
    assert torch.allclose(rank_scores(scores, site) * site.groups, torch.tensor(by_hand))


def test_keys_and_values_are_refitted_too(model, batches):
    """Their input has drifted like that of the queries."""
    dense = copy.deepcopy(model)
    mask = {"heads.0": torch.tensor([True, False, True, False, False, True, False, True])}
    report = liar.reconstruct(model, mask, batches, progress=False)
    assert (report.sites[0].kept, report.sites[0].total) == (4, 8)
    first, second = model.model.layers
    assert torch.equal(first.self_attn.k_proj.weight, dense.model.layers[0].self_attn.k_proj.weight)
    for name in ("q_proj", "k_proj", "v_proj"):
        new, old = (getattr(layer.self_attn, name).weight for layer in (second, dense.model.layers[1]))
        assert new.shape == old.shape
        assert not torch.equal(new, old)


@pytest.mark.parametrize("target", TARGETS)
def test_repair_helps(target, model, batches):
    mask = liar.select(model, batches, keep=0.6, heads="query", progress=False)
    bare, repaired = copy.deepcopy(model), copy.deepcopy(model)
    liar.remove(bare, mask)
    liar.reconstruct(repaired, mask, batches, target=target, progress=False)
    new = tiny_batches(model, seed=5)[0]
    dense = model(**new).logits
    assert (repaired(**new).logits - dense).square().mean() < (bare(**new).logits - dense).square().mean()


def test_rows_of_query_heads_are_read_as_what_they_say(model):
    layout = layout_of(model)
    whole = liar.Mask.of({"heads": torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]] * 2)}, layout)
    assert whole["heads.0"].tolist() == [False, True]
    single = liar.Mask.of({"heads": torch.tensor([[0, 1, 0, 0, 1, 0, 0, 0]] * 2)}, layout)
    assert single["heads.0"].tolist() == [False, True, False, False, True, False, False, False]
    by_query = layout.counted_by("query")
    assert liar.Mask.of({"heads.0": [1, 4]}, by_query)["heads.0"].equal(single["heads.0"])
    assert liar.Mask.from_removed({"heads.0": [0, 2, 3, 5, 6, 7]}, by_query)["heads.0"].equal(single["heads.0"])
    assert liar.Mask.from_json(single.to_json()) == single


@pytest.mark.parametrize("row", [[1, 1, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0, 0]])
def test_unequal_groups_are_refused(row, model, batches):
    says = r"heads\.1 .*equally many heads to stay in all 2 groups, got [02], 1"
    before = model_state(model)
    for mask in ({"heads.1": torch.tensor(row)}, liar.Mask({"heads.1": torch.tensor(row, dtype=torch.bool)})):
        with pytest.raises(MaskError, match=says):
            liar.reconstruct(model, mask, batches, progress=False)
    removed = [index for index, kept in enumerate(row) if not kept]
    with pytest.raises(MaskError, match="equally many heads to stay"):
        liar.Mask.from_removed({"heads.1": removed}, layout_of(model).counted_by("query"))
    assert_same_state(model, before)


def test_costs_of_whole_groups_are_refused(model):
    for budget in ("latency", liar.flops(model)):
        with pytest.raises(OptionError, match="heads='query' needs budget='params' or 'flops'"):
            liar.select(model, keep=0.5, criterion="magnitude", heads="query", budget=budget)
    with pytest.raises(OptionError, match="heads"):
        liar.select(model, keep=0.5, criterion="magnitude", heads="queries")
    with pytest.raises(BudgetError, match="cannot be met"):
        liar.select(model, keep=0.05, criterion="magnitude", heads="query")


def test_statistics_are_of_one_unit(model, batches):
    groups = liar.collect(model, batches, criteria=["reconstruction", "wanda"], progress=False)
    queries = liar.collect(model, batches, criteria=["reconstruction"], heads="query", progress=False)
    assert len(queries.sites["heads.0"]["order"]) == 8
    liar.select(model, queries, keep=0.6, heads="query")
    liar.select(model, groups, keep=0.6, criterion="wanda", heads="query")  # by channel: of either unit
    with pytest.raises(CalibrationError, match=r"expected 8 finite numbers .* with the same heads"):
        liar.select(model, groups, keep=0.6, heads="query")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_folders_load_again(count, model, tmp_path):
    row = (torch.arange(8) % OF_GROUP) < count
    liar.remove(model, {"heads.0": row, "neurons.1": list(range(40))})
    mask = liar.Mask.of({"heads.0": row}, layout_of(tiny_model("llama", num_attention_heads=8, head_dim=8)))
    with pytest.raises(liar.LiarError, match=r"the units of neurons\.1 differ"):
        liar.save(model, tmp_path / "slim", mask=mask)
    liar.save(model, tmp_path / "slim", standalone=True)
    batch = tiny_batches(model)[0]
    again = liar.load(tmp_path / "slim")
    assert [site.query_heads for site in layout_of(again).of_kind("heads")] == [count, OF_GROUP]
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    torch.save({"batch": dict(batch), "logits": model(**batch).logits}, tmp_path / "expected.pt")
    code = (
        "import sys; sys.modules['liar'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM\n"
        f"expected = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'slim')!r}, trust_remote_code=True)\n"
        "assert torch.equal(model(**expected['batch']).logits, expected['logits'])\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=tmp_path)


def test_a_model_is_cut_by_query_and_then_by_group(model, batches):
    liar.prune(model, batches, keep=0.5, heads="query", widths="uniform", progress=False)
    (left,) = {site.query_heads for site in layout_of(model).of_kind("heads")}
    assert left < OF_GROUP
    liar.reconstruct(model, {"heads": torch.tensor([[True, False]] * 2)}, batches, progress=False)
    assert [(site.units, site.query_heads) for site in layout_of(model).of_kind("heads")] == [(1, left)] * 2


def test_where_nothing_is_shared_it_is_all_the_same():
    model = tiny_model("bert")
    by_group, by_query = (liar.select(model, keep=0.5, criterion="magnitude", heads=heads) for heads in ("group", "query"))
    assert by_group == by_query
