"""The selections of the benchmarks: published searches against brute force, their gradients against the library's sums."""

import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import MODELS, quiet

import liar
from benchmarks.baselines import RULES
from benchmarks.selections import SAMPLE_LABELS, SELECTIONS, budget, flap, gradients, kprune, kwon, llm_pruner, searched
from benchmarks.selections.inputs import inputs_of
from liar.errors import BudgetError
from liar.runtime import Output, preserve_model_state
from liar.selection import CRITERIA, SiteWeights
from liar.selection.gradients import unit_gradients
from liar.testing import assert_same_state, model_state, tiny_batches, tiny_model

LOOK_AT_DATA = ("reconstruction", "fluctuation", "wanda", "taylor", "fisher", "snip")
# Those that read a next-token loss, or the model's predictions.
CAUSAL = ("llm_pruner", "searched", "searched_from_ours")
PUBLISHED = ("kwon", "kprune", "flap", "osscar")
NAMES = (*LOOK_AT_DATA, "query_heads", *PUBLISHED, "magnitude", "random")
MODEL_NAMES = ("bert", "bert-classifier", "llama", "llama-8q-2kv", "gpt2-lm")


def case(name, **options):
    model = tiny_model(**{**MODELS[name], **options})
    return model, tiny_batches(model, batches=2)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def checked(mask, model, keep):
    """Every site keeps a unit, and the share is met within 1 % or one unit, never exceeded."""
    layout = liar.discover(model)
    assert liar.Mask.of(mask, layout) == mask
    assert mask.masks.keys() == {site.name for site in layout.sites}
    share = mask.parameters(layout) / layout.parameters
    largest = max(site.parameters for site in layout.sites) / layout.parameters
    assert keep - max(0.01, largest) < share <= keep


def test_every_criterion_is_a_selection():
    assert set(SELECTIONS) == {*NAMES, *CAUSAL}
    assert set(PUBLISHED) == set(NAMES) - {*CRITERIA, "query_heads"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", ["bert-classifier", "llama"])
def test_every_selection_gives_a_mask_within_the_budget(model, name):
    model, batches = case(model)
    before = model_state(model)
    mask = SELECTIONS[name](model, batches, 0.6, 3)
    checked(mask, model, 0.6)
    assert mask.requested == 0.6
    assert mask == SELECTIONS[name](model, batches, 0.6, 3)
    assert_same_state(model, before)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("model", MODEL_NAMES)
def test_published_methods_meet_any_budget(model, name):
    model, batches = case(model)
    for keep in (0.25, 0.5, 0.83, 1.0):
        checked(SELECTIONS[name](model, batches, keep, 0), model, keep)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_methods_look_at_no_labels(name):
    model, batches = case("bert-classifier")
    labelled = [{**batch, "labels": torch.zeros(len(batch["input_ids"]), dtype=torch.int64)} for batch in batches]
    assert SELECTIONS[name](model, labelled, 0.5, 0) == SELECTIONS[name](model, batches, 0.5, 1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_methods_say_when_a_budget_is_too_small(name):
    model, batches = case("bert")
    with pytest.raises(BudgetError, match=r"one unit in each of 4 sites is 0\.\d+ of the parameters; 0\.0100 was requested"):
        SELECTIONS[name](model, batches, 0.01, 0)


def test_criteria_share_widths_and_statistics_with_the_library():
    model, batches = case("bert-classifier")
    for name, widths in (("fluctuation", "balanced"), ("fisher", "free"), ("reconstruction", "free")):
        statistics = liar.collect(model, batches, criteria=[name], progress=False)
        expected = liar.select(model, batches, keep=0.6, criterion=name, widths=widths, progress=False)
        assert SELECTIONS[name](model, statistics, 0.6, 0) == expected


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_gradients_of_sequences_add_up_to_the_librarys(name):
    model, batches = case(name, dtype=torch.float64)
    layout = liar.discover(model)
    result = kwon.sequence_gradients(model, batches)
    expected = unit_gradients(model, layout, liar.Calibration.of(batches, model), progress=quiet())
    for site in layout.sites:
        rows = result[site.name]
        assert rows.shape == (sum(len(batch["input_ids"]) for batch in batches), site.units)
        torch.testing.assert_close(rows.sum(0), expected[site.name]["gradient"])
        torch.testing.assert_close(rows.square().sum(0), expected[site.name]["squared_gradient"])


@pytest.mark.parametrize("keep", [0.55, 0.61, 0.7, 0.83])
@pytest.mark.parametrize("seed", range(3))
def test_search_is_the_best_of_all_masks(keep, seed):
    model = tiny_model(num_attention_heads=2, intermediate_size=4)
    layout, limits = liar.discover(model), budget.Budget.of(model, keep)
    importance = {site.name: drawn(site.units, seed=10 * seed + i).square() for i, site in enumerate(layout.sites)}
    result = kwon.search(importance, layout, limits)
    spent = sum(site.parameters * int(result[site.name].sum()) for site in layout.sites)
    assert spent <= limits.left
    assert all(rows.any() for rows in result.values())
    some = [[rows for rows in itertools.product([True, False], repeat=site.units) if any(rows)] for site in layout.sites]
    best = float("inf")
    for rows in itertools.product(*some):
        if sum(site.parameters * sum(row) for site, row in zip(layout.sites, rows, strict=True)) <= limits.left:
            gone = zip(importance.values(), rows, strict=True)
            best = min(best, sum(float(values[~torch.tensor(row)].sum()) for values, row in gone))
    assert sum(float(importance[name][~rows].sum()) for name, rows in result.items()) == pytest.approx(best)


def test_search_prefers_neither_kind():
    """Only heads matter, then only neurons: all of what matters stays, if it fits."""
    model = tiny_model(intermediate_size=32)
    layout, limits = liar.discover(model), budget.Budget.of(model, 0.7)
    for kind in ("heads", "neurons"):
        importance = {site.name: torch.full([site.units], float(site.kind == kind)) for site in layout.sites}
        result = kwon.search(importance, layout, limits)
        assert all(result[site.name].all() for site in layout.of_kind(kind))


def form(fisher, keep):
    gone = (~keep).double()
    return float(gone @ fisher @ gone)


@pytest.mark.parametrize("seed", range(12))
def test_rearrangement_ends_where_no_swap_helps(seed):
    units, sequences = 4 + seed, 6
    rows = drawn(sequences, units, seed=seed)
    fisher, keep = rows.T @ rows, torch.zeros(units, dtype=torch.bool)
    keep[drawn(units, seed=seed + 50).argsort()[: 1 + seed // 2]] = True
    given = keep.clone()
    result = kwon.rearranged(fisher, keep)
    assert torch.equal(keep, given)
    assert result.sum() == keep.sum()
    assert form(fisher, result) <= form(fisher, keep)
    for i, j in itertools.product((~result).nonzero().flatten(), result.nonzero().flatten()):
        swapped = result.clone()
        swapped[i], swapped[j] = True, False
        assert form(fisher, swapped) >= form(fisher, result) - 1e-9


def test_rearrangement_sees_what_the_diagonal_cannot():
    """Units 0 and 1 are each other's opposite: both may go, though each by itself matters more than units 2 and 3."""
    rows = torch.tensor([[3.0, -3.0, 2.0, 0.0], [0.0, 0.0, 0.0, 2.0]], dtype=torch.float64)
    fisher = rows.T @ rows
    keep = torch.tensor([True, True, False, False])
    assert kwon.rearranged(fisher, torch.tensor([False, True, True, False])).tolist() == [False, False, True, True]
    assert form(fisher, kwon.rearranged(fisher, keep)) <= form(fisher, keep)
    for whole in (torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)):
        assert torch.equal(kwon.rearranged(fisher, whole), whole)


@pytest.mark.parametrize("name", ["bert", "bert-classifier", "llama", "llama-lm"])
def test_knowledge_against_plain_autograd(name):
    """Of a model that is not dense any more: the derivative by explicit factors, and what a channel adds to the output."""
    model, batches = case(name, dtype=torch.float64)
    layout, calibration, pruned = liar.discover(model), liar.Calibration.of(batches, model), copy.deepcopy(model)
    with preserve_model_state(pruned):
        dense = kprune.run_dense(pruned, layout, calibration)
        pruned.get_submodule(layout.sites[0].module).weight.data[:, :8] = 0
        sites = layout.sites[2:]
        result = kprune.measure(pruned, sites, calibration, dense)
    assert result.residual.shape == (calibration.tokens, layout.sites[2].out)
    pruned.requires_grad_(False)
    for site in sites:
        consumer = pruned.get_submodule(site.module)
        expected = torch.zeros(consumer.in_features, dtype=torch.float64)
        for number, batch in enumerate(calibration.batches):
            token_mask, inputs = calibration.token_masks[number], []
            factors = torch.ones(consumer.in_features, requires_grad=True)

            def scale(_, args, factors=factors, inputs=inputs):
                inputs.append(args[0])
                return (args[0] * factors,)

            handle = consumer.register_forward_pre_hook(scale)
            returned = pruned(**batch)
            handle.remove()
            loss = naive_distance(returned, model(**batch), token_mask) / len(token_mask)
            (gradient,) = torch.autograd.grad(loss, factors)
            expected += gradient.double().square() / 2 / calibration.sequences
            added = inputs[0][token_mask][:, :, None] * consumer.weight.T
            expected += kprune.REPRESENTATION * added.square().mean(2).sum(0) / calibration.tokens
        torch.testing.assert_close(result.knowledge[site.name], expected, rtol=1e-4, atol=1e-4 * float(expected.max()))


def naive_distance(returned, dense, token_mask):
    """Sequence by sequence, with sums written out."""
    total = 0
    for i, kept in enumerate(token_mask):
        if "logits" not in returned:
            one, other = (model[0][i][kept].mean(0) for model in (returned, dense))
            total = total + (one - other).square().sum() / other.detach().square().sum()
            continue
        one, other = (model.logits[i] / 2 for model in (returned, dense))
        one, other = (rows[kept] if rows.ndim == 2 else rows[None] for rows in (one, other))
        chances = other.detach().softmax(-1)
        total = total + 4 * (chances * (chances.log() - one.log_softmax(-1))).sum(-1).mean()
    return total


def test_a_dense_model_loses_no_prediction():
    """The divergence is at its least, so the first sub-layer is decided by what its units add to the stream."""
    model, batches = case("bert-classifier", dtype=torch.float64)
    layout, calibration, pruned = liar.discover(model), liar.Calibration.of(batches, model), copy.deepcopy(model)
    with preserve_model_state(pruned):
        dense = kprune.run_dense(pruned, layout, calibration)
        result = kprune.measure(pruned, layout.sites, calibration, dense)
    moments = liar.collect(model, batches, criteria=["wanda"], progress=False).sites
    for site in layout.sites:
        power = moments[site.name]["variance"] + moments[site.name]["mean"].square()
        expected = kprune.REPRESENTATION * power * model.get_submodule(site.module).weight.square().mean(0)
        torch.testing.assert_close(result.knowledge[site.name], expected)


def test_numbers_are_compared_by_squares():
    rows = drawn(5, 1)
    output = Output("logits", rows + 3, kind="numbers", by_token=False)
    token_mask = torch.ones(5, 2, dtype=torch.bool)
    assert float(kprune.distance([output], [replace(output, rows=rows)], token_mask)) == pytest.approx(45)


@pytest.mark.parametrize("name", ["bert-classifier", "llama", "gpt2-lm"])
def test_the_copy_is_tuned_as_the_rule_tunes(monkeypatch, name):
    """At the end the selection's copy computes what the rule `kprune` makes of the dense model with the same mask."""
    model, batches = case(name, dtype=torch.float64)
    copies = []
    monkeypatch.setattr(kprune, "frozen_copy", lambda model: copies.append(gradients.frozen_copy(model)) or copies[0])
    mask = SELECTIONS["kprune"](model, batches, 0.7, 0)
    RULES["kprune"](model, mask, batches)
    with torch.no_grad():
        for batch in batches:
            real = batch["attention_mask"].bool()
            result, expected = (other(**batch)[0] for other in (copies[0], model))
            result, expected = (rows[real] if rows.shape[:2] == real.shape else rows for rows in (result, expected))
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_labels_are_sampled_only_where_the_tables_say_so(monkeypatch):
    """Of batches without labels: other sampled labels change these masks' statistics, and no others."""
    model, batches = case("bert-classifier")
    swapped = [{name: rows.flip(0) for name, rows in batch.items()} for batch in batches]
    for name in (*LOOK_AT_DATA, "kwon"):
        # Labels are sampled by the place of a sequence; in another order the same sequences get other labels.
        one, other = (statistics_of(name, model, each) for each in (batches, swapped))
        same = all(torch.allclose(one[key], other[key], rtol=1e-3, atol=1e-6) for key in one)
        assert same == (name not in SAMPLE_LABELS), name


def statistics_of(name, model, batches):
    if name == "kwon":
        return {key: rows.square().sum(0) for key, rows in kwon.sequence_gradients(model, batches).items()}
    sites = liar.collect(model, batches, criteria=[name], progress=False).sites
    return {(site, key): value for site, values in sites.items() for key, value in values.items()}


# Selections for language models


@pytest.fixture
def short_search(monkeypatch):
    monkeypatch.setattr(searched, "GENERATIONS", 3)
    monkeypatch.setattr(searched, "OFFSPRING", 3)
    monkeypatch.setattr(searched, "STAGES", ((16, 2), (32, 1)))


@pytest.mark.parametrize("name", CAUSAL)
def test_selections_for_language_models_meet_the_budget(name, short_search):
    model = tiny_model("llama", head="causal-lm", num_hidden_layers=3, intermediate_size=48)
    batches, layout, before = tiny_batches(model, batches=2), liar.discover(model), model_state(model)
    mask = SELECTIONS[name](model, batches, 0.6, 3)
    assert 0.45 < mask.parameters(layout) / layout.parameters <= 0.6
    assert all(mask.kept(site.name) for site in layout.sites)
    assert mask == SELECTIONS[name](model, batches, 0.6, 3)
    assert_same_state(model, before)


def test_flap_standardises_the_channels_of_a_layer_and_squares_those_of_heads():
    for kind, width in (("heads", 4), ("neurons", 1)):
        consumer, variance = drawn(6, width, 5), drawn(6 * width, seed=1).square()
        weights = SiteWeights((), consumer, 1, {"variance": variance}, 0)
        channels = np.array(
            [[float(variance[4 * u + c] if width == 4 else variance[u]) for c in range(width)] for u in range(6)]
        )
        metric = channels * consumer.square().sum(2).numpy()
        metric = metric**2 if kind == "heads" else metric
        expected = ((metric - metric.mean()) / metric.std(ddof=1)).mean(1)
        torch.testing.assert_close(flap.standardised(weights, kind), torch.from_numpy(expected))


def test_llm_pruner_sums_first_order_changes_of_all_weights_of_a_unit():
    """Against a plain backward pass: L is the sum of next-token losses over real tokens."""
    model = tiny_model("llama", head="causal-lm", num_hidden_layers=2)
    batches = tiny_batches(model, batches=2)
    found = llm_pruner.importance(model, batches)
    plain = copy.deepcopy(model)
    for batch in liar.Calibration.of(batches, plain).batches:
        logits, mask = plain(**batch).logits, batch["attention_mask"].bool()
        seen = mask[:, 1:] & torch.ones_like(mask[:, 1:])
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
        losses[seen].sum().backward()
    block = plain.model.layers[1]
    changes = [(layer.weight * layer.weight.grad).abs() for layer in (block.mlp.gate_proj, block.mlp.up_proj)]
    down = (block.mlp.down_proj.weight * block.mlp.down_proj.weight.grad).abs()
    expected = changes[0].sum(1) + changes[1].sum(1) + down.sum(0)
    torch.testing.assert_close(found["neurons.1"], expected.double().detach(), rtol=1e-4, atol=1e-8)


def test_llm_pruner_leaves_the_first_and_last_blocks_whole():
    model = tiny_model("llama", head="causal-lm", num_hidden_layers=16)
    pruned = llm_pruner.pruned_sites(liar.discover(model))
    assert sorted({int(site.name.split(".")[1]) for site in pruned}) == list(range(2, 15))


def test_osscar_keeps_about_the_best_units_of_a_small_layer():
    """By brute force: the error of the layer's output once what stays is refitted."""

    model = tiny_model("llama", num_hidden_layers=1, intermediate_size=8)
    batches = tiny_batches(model, batches=2)
    mask, inputs = SELECTIONS["osscar"](model, batches, 0.5, 0), inputs_of(model, batches)["neurons.0"]
    count = mask.kept("neurons.0")

    def error(kept):
        candidate = searched.Candidates(torch.tensor([u for u in range(8) if u not in kept] + list(kept)), inputs, [])
        change = candidate.weight(len(kept)) - inputs.weight
        return float((change * (inputs.gram @ change)).sum())

    errors = {kept: error(kept) for kept in itertools.combinations(range(8), count)}
    chosen = tuple(mask["neurons.0"].nonzero().flatten().tolist())
    assert errors[chosen] <= 1.1 * min(errors.values()) < max(errors.values())


def test_a_mutation_moves_width_between_layers_of_a_kind():
    model = tiny_model("llama", head="causal-lm", num_hidden_layers=4, intermediate_size=48)
    batches, layout = tiny_batches(model, batches=1), liar.discover(model)
    inputs = inputs_of(model, batches)
    candidates = {site.name: searched.Candidates.of(site, inputs[site.name]) for site in layout.sites}
    search = searched.Search(model, layout, candidates, batches, seed=1)
    widths = {site.name: candidates[site.name].widths[len(candidates[site.name].widths) // 2] for site in layout.sites}
    total = lambda child, kind: sum(child[site.name] for site in layout.of_kind(kind))  # noqa: E731
    moved = 0
    for _ in range(50):
        child = search.mutated(widths)
        assert all(total(child, kind) == total(widths, kind) for kind in ("heads", "neurons"))
        assert all(child[name] in candidates[name].widths for name in child)
        moved += child != widths
        widths = child
    assert moved > 25


def test_a_search_ends_where_the_output_is_nearer(monkeypatch):
    """The whole model hardly diverges from itself, and the end of a search less than its beginning."""
    model = tiny_model("llama", head="causal-lm", num_hidden_layers=3, intermediate_size=48)
    batches, layout = tiny_batches(model, batches=2), liar.discover(model)
    inputs = inputs_of(model, batches)
    candidates = {site.name: searched.Candidates.of(site, inputs[site.name]) for site in layout.sites}
    search = searched.Search(model, layout, candidates, batches, seed=0)
    widths = {site.name: candidates[site.name].widths[0] for site in layout.sites}
    with torch.inference_mode():
        drawn_sequences = search.drawn(400)
        begin, dense = (search.divergence(each, drawn_sequences) for each in (widths, {s.name: s.units for s in layout.sites}))
    assert dense < 1e-3 * begin
    monkeypatch.setattr(searched, "GENERATIONS", 4)
    monkeypatch.setattr(searched, "OFFSPRING", 3)
    monkeypatch.setattr(searched, "STAGES", ((400, 2), (400, 1)))
    middle = {site.name: candidates[site.name].widths[len(candidates[site.name].widths) // 2] for site in layout.sites}
    end = search.run(middle)
    with torch.inference_mode():
        assert search.divergence(end, drawn_sequences) <= search.divergence(middle, drawn_sequences)
