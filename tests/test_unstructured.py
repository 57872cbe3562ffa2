"""Single weights: every criterion against naive code, alone and in the walk over a model; masks that hold; errors."""

import copy
from contextlib import nullcontext
from itertools import combinations

import numpy as np
import pytest
import reference
import torch
from cases import rows
from torch import nn

import liar
from liar import unstructured
from liar.errors import CalibrationError, MaskError, ModelError, OptionError
from liar.models import linear_layers
from liar.testing import assert_same_state, model_state, tiny_batches, tiny_model

CRITERIA = list(unstructured.CRITERIA)
SPARSITIES = [0.3, 0.5, "2:4", "1:4", "4:8"]
BATCHES = tiny_batches(tiny_model("llama"))


def weights(out, channels, seed=0):
    return np.random.default_rng(seed).normal(size=(out, channels))


def pruned_by(criterion, weight, x, sparsity):
    """What the library makes of a weight [out, in] and inputs [tokens, in]."""
    kind = unstructured.CRITERIA[criterion]
    statistics = None if kind.statistics is None else kind.statistics()
    if statistics is not None:
        for part in np.array_split(x, 3):
            kind.update(statistics, torch.from_numpy(part.copy()))
    new, removed = kind.remove(torch.from_numpy(weight.copy()), statistics, sparsity)
    return new.numpy(), removed.numpy()


def loss(weight, other, x):
    return np.square(x @ (weight - other).T).sum()


# One layer


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(("out", "channels"), [(5, 24), (1, 8), (3, 136)])
def test_criteria_are_those_of_the_papers(criterion, sparsity, out, channels):
    weight, x = weights(out, channels), rows(400, channels, condition=30)
    expected, removed = reference.sparse(criterion, weight, x, sparsity)
    new, chosen = pruned_by(criterion, weight, x, sparsity)
    np.testing.assert_array_equal(chosen, removed)
    np.testing.assert_allclose(new, expected, rtol=1e-7, atol=1e-9)
    assert (new[removed] == 0).all()


def test_patterns_that_do_not_divide_the_columns_handled_together():
    """126 columns, not 128, are whole groups of three; and the last ones are fewer."""
    weight, x = weights(4, 132), rows(400, 132, condition=30)
    expected, removed = reference.sparse("sparsegpt", weight, x, "1:3")
    new, chosen = pruned_by("sparsegpt", weight, x, "1:3")
    np.testing.assert_array_equal(chosen, removed)
    np.testing.assert_allclose(new, expected, rtol=1e-7, atol=1e-9)


def test_an_input_that_is_always_zero_goes_first():
    x = rows(200, 8)
    x[:, 5] = 0
    for criterion in ("wanda", "sparsegpt"):
        new, removed = pruned_by(criterion, weights(3, 8), x, 0.25)
        expected, chosen = reference.sparse(criterion, weights(3, 8), x, 0.25)
        assert removed[:, 5].all()
        np.testing.assert_array_equal(removed, chosen)
        np.testing.assert_allclose(new, expected, rtol=1e-7, atol=1e-9)
    assert not pruned_by("sparsegpt", weights(3, 8), np.zeros((9, 8)), 0.5)[0].any()


def test_the_update_lies_between_the_mask_alone_and_the_best_there_is():
    """Best: of all masks of a row, each with the least-squares answer on what it keeps."""
    x, total = rows(300, 6, condition=30, mean=0), np.zeros(3)
    for seed in range(20):
        weight = weights(1, 6, seed)
        new, removed = pruned_by("sparsegpt", weight, x, 0.5)
        best = np.inf
        for kept in combinations(range(6), 3):
            fitted = np.zeros_like(weight)
            fitted[:, kept] = np.linalg.lstsq(x[:, kept], x @ weight.T, rcond=None)[0].T
            best = min(best, loss(fitted, weight, x))
        assert best <= loss(new, weight, x) * (1 + 1e-9)
        total += best, loss(new, weight, x), loss(np.where(removed, 0, weight), weight, x)
    assert total[0] < total[1] < 0.7 * total[2]


def test_only_magnitude_is_blind_to_the_inputs():
    weight, x = weights(4, 16), rows(200, 16)
    louder = x * np.where(np.arange(16) < 8, 100, 1)
    for criterion in CRITERIA:
        changed = (pruned_by(criterion, weight, x, 0.5)[1] != pruned_by(criterion, weight, louder, 0.5)[1]).any()
        assert changed == (criterion != "magnitude")


# A model


def inputs_of(model, layers, batches):
    """What each layer reads at the real tokens."""
    inputs, real = {id(layer): [] for layer in layers}, None
    note = lambda layer, args: inputs[id(layer)].append(args[0].reshape(*real.shape, -1)[real])  # noqa: E731
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    for batch in batches:
        real = batch["attention_mask"].bool()
        with torch.no_grad():
            model(**batch)
    for hook in hooks:
        hook.remove()
    return inputs


def naive(model, batches, criterion, sparsity):
    """Block by block: the whole model runs with plain hooks, then the block's weights are replaced."""
    model, masks = copy.deepcopy(model), {}
    names = {id(module): name for name, module in model.named_modules()}
    for block in reference.blocks(model):
        layers = [module for module in block.modules() if hasattr(module, "weight") and module.weight.ndim == 2]
        inputs = inputs_of(model, layers, batches)
        for layer in layers:
            x, stored = torch.cat(inputs[id(layer)]).double().numpy(), layer.weight.detach().double().numpy()
            linear = isinstance(layer, nn.Linear)
            new, removed = reference.sparse(criterion, stored if linear else stored.T, x, sparsity)
            layer.weight.data = torch.from_numpy(new if linear else new.T.copy()).float()
            masks[f"{names[id(layer)]}.weight"] = torch.from_numpy(~(removed if linear else removed.T))
    return model, masks


@pytest.mark.parametrize("sparsity", [0.4, "2:4"])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_models_are_pruned_as_naive_code_does_it(family, criterion, sparsity):
    """OPT's feed-forward layers belong to no site of its table; GPT-2 stores weights transposed."""
    model = tiny_model(family, head="causal-lm")
    dense = copy.deepcopy(model)
    expected, masks = naive(model, BATCHES, criterion, sparsity)
    result = unstructured.prune(model, BATCHES, sparsity=sparsity, criterion=criterion, progress=False)
    assert result.masks.keys() == masks.keys()
    for name, mask in masks.items():
        assert torch.equal(result.masks[name], mask), name
        assert not model.get_parameter(name)[~mask].any()
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=1e-4, atol=1e-5)
    for name, value in dense.named_parameters():
        if name not in masks:
            assert torch.equal(model.get_parameter(name), value), name
        elif criterion != "sparsegpt":
            assert torch.equal(model.get_parameter(name)[masks[name]], value[masks[name]]), name
    assert result.sparsity == pytest.approx(0.5 if sparsity == "2:4" else 0.4, abs=0.01)
    assert result.tokens == (0 if criterion == "magnitude" else sum(int(b["attention_mask"].sum()) for b in BATCHES))


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "gpt_neox", "qwen2_moe", "vit"])
def test_all_linear_layers_of_a_block_are_pruned(family):
    """DeBERTa's also run on positions, GPT-NeoX has parallel parts, a shared expert reads tokens without their sequences."""
    model = tiny_model(family, **({"shared_expert_intermediate_size": 16} if family == "qwen2_moe" else {}))
    layers = [
        f"{block}.{name}.weight" for block in liar.discover(model).blocks for name in linear_layers(model.get_submodule(block))
    ]
    result = unstructured.prune(model, tiny_batches(model), criterion="sparsegpt", progress=False)
    assert list(result.masks) == layers
    assert all(not model.get_parameter(name)[~mask].any() for name, mask in result.masks.items())


def test_a_pruned_model_in_16_bits():
    model = tiny_model("llama", dtype=torch.bfloat16)
    liar.remove(model, liar.select(model, keep=0.6, criterion="magnitude"))
    result = unstructured.prune(model, BATCHES, criterion="sparsegpt", progress=False)
    assert {model.get_parameter(name).dtype for name in result.masks} == {torch.bfloat16}
    assert all(not model.get_parameter(name)[~mask].any() for name, mask in result.masks.items())


# Masks that hold


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_masks_hold_while_the_rest_is_trained(optimizer):
    model = tiny_model("llama", head="causal-lm")
    masks = unstructured.prune(model, sparsity=0.5, criterion="magnitude").masks
    before = {name: model.get_parameter(name).detach().clone() for name in masks}
    how = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    stepping = optimizer(model.parameters(), lr=0.01, weight_decay=0.1, **how)
    with liar.unstructured.hold_masks(model, masks):
        for batch in BATCHES:
            stepping.zero_grad()
            model(**batch, labels=batch["input_ids"]).loss.backward()
            stepping.step()
            assert all(not model.get_parameter(name)[~mask].any() for name, mask in masks.items())
    for name, mask in masks.items():
        assert (model.get_parameter(name) != before[name])[mask].float().mean() > 0.9
    model(**BATCHES[0], labels=BATCHES[0]["input_ids"]).loss.backward()
    stepping.step()
    assert any(model.get_parameter(name)[~mask].any() for name, mask in masks.items()), "held after the context"


def test_masks_are_applied_again_to_a_part_and_to_its_copy():
    model = tiny_model("llama")
    dense = copy.deepcopy(model)
    masks = unstructured.prune(model, criterion="magnitude").masks
    liar.unstructured.apply_masks(dense.layers[1], masks, prefix="layers.1.")
    for name, mask in masks.items():
        assert bool(dense.get_parameter(name)[~mask].any()) == name.startswith("layers.0.")
    with torch.inference_mode():
        liar.unstructured.apply_masks(dense, masks)
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in dense.named_parameters())


@pytest.mark.parametrize(
    ("masks", "says"),
    [
        ({"layers.7.x.weight": torch.ones(2, 2, dtype=torch.bool)}, "has no parameter of this name"),
        (
            {"norm.weight": torch.ones(3, dtype=torch.bool)},
            r"expected torch.bool \[32\], as the parameter, got torch.bool \[3\]",
        ),
        ({"norm.weight": torch.ones(32)}, "got torch.float32"),
        ({"norm.weight": [True] * 32}, "got a list"),
    ],
)
@pytest.mark.parametrize("use", [liar.unstructured.apply_masks, liar.unstructured.hold_masks])
def test_masks_of_something_else(masks, says, use):
    model = tiny_model("llama")
    before = model_state(model)
    first = {"layers.0.mlp.up_proj.weight": torch.zeros(64, 32, dtype=torch.bool)}
    with pytest.raises(MaskError, match=says), use(model, {**first, **masks}) or nullcontext():
        pass
    assert_same_state(model, before)


# Errors leave the model as it was


@pytest.mark.parametrize(
    ("change", "calib", "options", "error", "says"),
    [
        ({}, None, {}, CalibrationError, "criterion='wanda' needs activations: pass calibration batches"),
        ({"intermediate_size": 62}, BATCHES, {"sparsity": "2:4"}, OptionError, "layers.0.mlp.down_proj has 62; give a share"),
        ({}, BATCHES, {"sparsity": 1.0}, OptionError, "expected the share of weights that is removed, above 0 and below 1"),
        ({}, [], {}, CalibrationError, "the calibration data is empty"),
    ],
)
def test_errors(change, calib, options, error, says):
    model = tiny_model("llama", **change)
    before = model_state(model)
    with pytest.raises(error, match=says):
        unstructured.prune(model, calib, **options, progress=False)
    assert_same_state(model, before)


def test_something_that_is_no_model():
    with pytest.raises(ModelError, match="expected a Hugging Face model, got a str"):
        unstructured.prune("bert", criterion="magnitude")


@pytest.mark.parametrize("criterion", CRITERIA)
def test_damaged_weights_are_named(criterion):
    model = tiny_model("llama")
    model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    before = model_state(model)
    with pytest.raises(CalibrationError, match=r"layers.1.mlp.up_proj .*NaN or Inf in the weights|layers.1.mlp.down_proj"):
        unstructured.prune(model, BATCHES, criterion=criterion, progress=False)
    assert_same_state(model, before)


@pytest.mark.parametrize("criterion", ["magnitude", "wanda"])
@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_a_run_that_is_stopped_changes_nothing(criterion, fraction):
    model = tiny_model("llama")
    before = model_state(model)

    def stop(update):
        if update.fraction >= fraction:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unstructured.prune(model, BATCHES, criterion=criterion, progress=stop)
    assert_same_state(model, before)
