"""The selections of the benchmarks: the rivals' searches against brute force, their gradients against the library's sums."""

import copy
import importlib
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import MODELS

import liar
from liar.batches import Calibration
from liar.capture import preserved
from liar.errors import BudgetError
from liar.families import discover
from liar.gradients import unit_gradients
from liar.testing import tiny_batches, tiny_model
from liar.testing.guest import assert_same_state, guest_state

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
LOOK_AT_DATA = ("reconstruction", "fluctuation", "wanda", "taylor", "fisher", "snip")
NAMES = (*LOOK_AT_DATA, "kwon", "kprune", "magnitude", "random", "dropping")
RIVALS = ("kwon", "kprune")
GUESTS = ("bert", "bert-classifier", "llama", "llama-8q-2kv")


@pytest.fixture(scope="module")
def selections():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("selections")


def module(name):
    return importlib.import_module(f"selections.{name}")


def guest(name, **options):
    model = tiny_model(**{**MODELS[name], **options})
    return model, tiny_batches(model, batches=2)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def checked(mask, model, keep):
    """Every site keeps a unit, and the share is met within 1 % or one unit, never exceeded."""
    layout = discover(model)
    assert liar.Mask.of(mask, layout) == mask
    assert mask.keep.keys() == {site.name for site in layout.sites}
    share = mask.parameters(layout) / layout.parameters
    largest = max(site.parameters for site in layout.sites) / layout.parameters
    assert keep - max(0.01, largest) < share <= keep


def test_every_criterion_is_a_selection(selections):
    assert tuple(selections.SELECTIONS) == NAMES
    assert {"kwon", "kprune", "dropping"} == set(NAMES) - set(liar.criteria.CRITERIA)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", ["bert-classifier", "llama"])
def test_every_selection_gives_a_mask_within_the_budget(selections, model, name):
    model, batches = guest(model)
    before = guest_state(model)
    mask = selections.SELECTIONS[name](model, batches, 0.6, 3)
    checked(mask, model, 0.6)
    assert mask.asked == 0.6
    assert mask == selections.SELECTIONS[name](model, batches, 0.6, 3)
    assert_same_state(model, before)


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("model", GUESTS)
def test_rivals_meet_any_budget(selections, model, name):
    model, batches = guest(model)
    for keep in (0.25, 0.5, 0.83, 1.0):
        checked(selections.SELECTIONS[name](model, batches, keep, 0), model, keep)


@pytest.mark.parametrize("name", RIVALS)
def test_rivals_look_at_no_labels(selections, name):
    model, batches = guest("bert-classifier")
    labelled = [{**batch, "labels": torch.zeros(len(batch["input_ids"]), dtype=torch.int64)} for batch in batches]
    assert selections.SELECTIONS[name](model, labelled, 0.5, 0) == selections.SELECTIONS[name](model, batches, 0.5, 1)


@pytest.mark.parametrize("name", RIVALS)
def test_rivals_say_when_a_budget_is_too_small(selections, name):
    model, batches = guest("bert")
    with pytest.raises(BudgetError, match=r"one unit in each of 4 sites is 0\.\d+ of the parameters; 0\.01"):
        selections.SELECTIONS[name](model, batches, 0.01, 0)


def test_criteria_share_a_scope_and_statistics_with_the_library(selections):
    model, batches = guest("bert-classifier")
    for name, scope in (("fluctuation", "layer"), ("fisher", "global"), ("reconstruction", "global")):
        statistics = liar.collect(model, batches, criteria=[name], progress=False)
        expected = liar.select(model, batches, keep=0.6, criterion=name, scope=scope, progress=False)
        assert selections.SELECTIONS[name](model, statistics, 0.6, 0) == expected


@pytest.mark.parametrize("name", GUESTS)
def test_gradients_of_sequences_add_up_to_the_librarys(selections, name):
    model, batches = guest(name, dtype=torch.float64)
    layout = discover(model)
    found = module("kwon").gradients(model, batches)
    expected = unit_gradients(model, layout, Calibration.of(batches, model), progress=False)
    for site in layout.sites:
        rows = found[site.name]
        assert rows.shape == (sum(len(batch["input_ids"]) for batch in batches), site.units)
        torch.testing.assert_close(rows.sum(0), expected[site.name]["gradient"])
        torch.testing.assert_close(rows.square().sum(0), expected[site.name]["squared_gradient"])


@pytest.mark.parametrize("keep", [0.55, 0.61, 0.7, 0.83])
@pytest.mark.parametrize("seed", range(3))
def test_search_is_the_best_of_all_masks(selections, keep, seed):
    model = tiny_model(num_attention_heads=2, intermediate_size=4)
    layout, budget = discover(model), module("budget").Budget.of(model, keep)
    importance = {site.name: drawn(site.units, seed=10 * seed + i).square() for i, site in enumerate(layout.sites)}
    found = module("kwon").search(importance, layout, budget)
    spent = sum(site.parameters * int(found[site.name].sum()) for site in layout.sites)
    assert spent <= budget.left
    assert all(rows.any() for rows in found.values())
    some = [[rows for rows in itertools.product([True, False], repeat=site.units) if any(rows)] for site in layout.sites]
    best = float("inf")
    for rows in itertools.product(*some):
        if sum(site.parameters * sum(row) for site, row in zip(layout.sites, rows, strict=True)) <= budget.left:
            gone = zip(importance.values(), rows, strict=True)
            best = min(best, sum(float(values[~torch.tensor(row)].sum()) for values, row in gone))
    assert sum(float(importance[name][~rows].sum()) for name, rows in found.items()) == pytest.approx(best)


def test_search_prefers_neither_kind(selections):
    """Only heads matter, then only neurons: all of what matters stays, if it fits."""
    model = tiny_model(intermediate_size=32)
    layout, budget = discover(model), module("budget").Budget.of(model, 0.7)
    for kind in ("heads", "neurons"):
        importance = {site.name: torch.full([site.units], float(site.kind == kind)) for site in layout.sites}
        found = module("kwon").search(importance, layout, budget)
        assert all(found[site.name].all() for site in layout.of_kind(kind))


def form(fisher, keep):
    gone = (~keep).double()
    return float(gone @ fisher @ gone)


@pytest.mark.parametrize("seed", range(12))
def test_rearrangement_ends_where_no_swap_helps(selections, seed):
    units, sequences = 4 + seed, 6
    rows = drawn(sequences, units, seed=seed)
    fisher, keep = rows.T @ rows, torch.zeros(units, dtype=torch.bool)
    keep[drawn(units, seed=seed + 50).argsort()[: 1 + seed // 2]] = True
    given = keep.clone()
    found = module("kwon").rearranged(fisher, keep)
    assert torch.equal(keep, given)
    assert found.sum() == keep.sum()
    assert form(fisher, found) <= form(fisher, keep)
    for i, j in itertools.product((~found).nonzero().flatten(), found.nonzero().flatten()):
        swapped = found.clone()
        swapped[i], swapped[j] = True, False
        assert form(fisher, swapped) >= form(fisher, found) - 1e-9


def test_rearrangement_sees_what_the_diagonal_cannot(selections):
    """Units 0 and 1 are each other's opposite: both may go, though each by itself matters more than units 2 and 3."""
    rows = torch.tensor([[3.0, -3.0, 2.0, 0.0], [0.0, 0.0, 0.0, 2.0]], dtype=torch.float64)
    fisher = rows.T @ rows
    keep = torch.tensor([True, True, False, False])
    kwon = module("kwon")
    assert kwon.rearranged(fisher, torch.tensor([False, True, True, False])).tolist() == [False, False, True, True]
    assert form(fisher, kwon.rearranged(fisher, keep)) <= form(fisher, keep)
    for whole in (torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)):
        assert torch.equal(kwon.rearranged(fisher, whole), whole)


@pytest.mark.parametrize("name", ["bert", "bert-classifier", "llama", "llama-lm"])
def test_knowledge_against_plain_autograd(selections, name):
    """Of a model that is not dense any more: the derivative by explicit factors, and what a channel adds to the output."""
    kprune = module("kprune")
    model, batches = guest(name, dtype=torch.float64)
    layout, calibration, pruned = discover(model), Calibration.of(batches, model), copy.deepcopy(model)
    with preserved(pruned):
        dense = kprune.seen_dense(pruned, layout, calibration)
        pruned.get_submodule(layout.sites[0].module).weight.data[:, :8] = 0
        sites = layout.sites[2:]
        found = kprune.measured(pruned, sites, calibration, dense)
    assert found.residual.shape == (calibration.tokens, layout.sites[2].out)
    pruned.requires_grad_(False)
    for site in sites:
        consumer = pruned.get_submodule(site.module)
        expected = torch.zeros(consumer.in_features, dtype=torch.float64)
        for number, batch in enumerate(calibration.batches):
            factors, keep, reads = torch.ones(consumer.in_features, requires_grad=True), calibration.keep[number], []

            def scale(_, args, factors=factors, reads=reads):
                reads.append(args[0])
                return (args[0] * factors,)

            handle = consumer.register_forward_pre_hook(scale)
            said = pruned(**batch)
            handle.remove()
            loss = naive_distance(said, model(**batch), keep) / len(keep)
            (slope,) = torch.autograd.grad(loss, factors)
            expected += slope.double().square() / 2 / calibration.sequences
            added = reads[0][keep][:, :, None] * consumer.weight.T
            expected += kprune.REPRESENTATION * added.square().mean(2).sum(0) / calibration.tokens
        torch.testing.assert_close(found.knowledge[site.name], expected, rtol=1e-4, atol=1e-4 * float(expected.max()))


def naive_distance(said, dense, keep):
    """Sequence by sequence, with sums written out."""
    total = 0
    for i, kept in enumerate(keep):
        if "logits" not in said:
            one, other = (model[0][i][kept].mean(0) for model in (said, dense))
            total = total + (one - other).square().sum() / other.detach().square().sum()
            continue
        one, other = (model.logits[i] / 2 for model in (said, dense))
        one, other = (rows[kept] if rows.ndim == 2 else rows[None] for rows in (one, other))
        chances = other.detach().softmax(-1)
        total = total + 4 * (chances * (chances.log() - one.log_softmax(-1))).sum(-1).mean()
    return total


def test_a_dense_model_loses_no_prediction(selections):
    """The divergence is at its least, so the first sub-layer is decided by what its units add to the stream."""
    kprune = module("kprune")
    model, batches = guest("bert-classifier", dtype=torch.float64)
    layout, calibration, pruned = discover(model), Calibration.of(batches, model), copy.deepcopy(model)
    with preserved(pruned):
        dense = kprune.seen_dense(pruned, layout, calibration)
        found = kprune.measured(pruned, layout.sites, calibration, dense)
    moments = liar.collect(model, batches, criteria=["wanda"], progress=False).sites
    for site in layout.sites:
        power = moments[site.name]["variance"] + moments[site.name]["mean"].square()
        expected = kprune.REPRESENTATION * power * model.get_submodule(site.module).weight.square().mean(0)
        torch.testing.assert_close(found.knowledge[site.name], expected)


def test_numbers_are_compared_by_squares(selections):
    kprune = module("kprune")
    rows = drawn(5, 1)
    said = liar.outputs.Output("logits", rows + 3, probable=False, by_token=False)
    keep = torch.ones(5, 2, dtype=torch.bool)
    assert float(kprune.distance([said], [replace(said, rows=rows)], keep)) == pytest.approx(45)


@pytest.mark.parametrize("name", ["bert-classifier", "llama"])
def test_the_probe_is_tuned_as_the_rule_tunes(selections, monkeypatch, name):
    """What the selection's copy says at its end is what the rule `kprune` makes of the dense model with the same mask."""
    kprune = module("kprune")
    model, batches = guest(name, dtype=torch.float64)
    kept = []
    monkeypatch.setattr(kprune, "probe", lambda guest: kept.append(module("slopes").probe(guest)) or kept[0])
    mask = selections.SELECTIONS["kprune"](model, batches, 0.7, 0)
    importlib.import_module("rivals").RULES["kprune"](model, mask, batches)
    with torch.no_grad():
        for batch in batches:
            real = batch["attention_mask"].bool()
            found, expected = (other(**batch)[0] for other in (kept[0], model))
            found, expected = (rows[real] if rows.shape[:2] == real.shape else rows for rows in (found, expected))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
