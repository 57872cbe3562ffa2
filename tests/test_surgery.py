"""A cut model computes what the masked full model computes, and works everywhere its dense original did."""

import copy

import pytest
import reference
import torch
from cases import KEEPS, MODELS
from torch import nn
from transformers import Trainer, TrainingArguments, pipeline
from transformers.pytorch_utils import Conv1D

import liar
from liar.models import Edge, LayerView, Segment, layout_of
from liar.surgery import copy_block, cut_site, stock, uniform_sizes
from liar.testing import tiny_batches, tiny_model

KINDS = ("heads", "neurons")


def keeps(model, pattern):
    layers = model.config.num_hidden_layers
    return {kind: [KEEPS[pattern](reference.units(model, kind), layer) for layer in range(layers)] for kind in KINDS}


def cut(model, keep):
    """A copy with units removed for good and nothing repaired."""
    model = copy.deepcopy(model)
    liar.remove(model, {kind: torch.tensor(rows) for kind, rows in keep.items()})
    return model


def repaired(model, pattern="unequal", **options):
    model = copy.deepcopy(model)
    keep = keeps(model, pattern)
    liar.reconstruct(
        model,
        {kind: torch.tensor(rows) for kind, rows in keep.items()},
        tiny_batches(model, batches=6, sequences=16),
        progress=False,
        **options,
    )
    return model


def written_back(model, small, pattern="unequal"):
    """The full model with a cut model's weights for the kept units, and zeros where removed units are read."""
    keep = keeps(model, pattern)
    full = reference.masked(model, keep)
    for site in layout_of(model).sites:
        kept = torch.from_numpy(reference.kept_channels(model, site.layer, site.kind, keep[site.kind][site.layer]))
        wide, narrow = full.get_submodule(site.module), small.get_submodule(site.module)
        reference.matrix(wide)[kept] = reference.matrix(narrow)
        if narrow.bias is not None:
            wide.bias = nn.Parameter(narrow.bias.detach().clone())
        for edge in site.producers:
            rows = edge.channels(torch.tensor(keep[site.kind][site.layer]))
            wide, narrow = (m.get_submodule(f"{site.block}.{edge.module}") for m in (full, small))
            reference.matrix(wide)[:, rows] = reference.matrix(narrow)
            if narrow.bias is not None:
                wide.bias.data[rows] = narrow.bias.data
    return full


def everything(model, batch):
    """All tensors a model with any head gives back for a batch, at the real tokens where there is one value per token."""
    with torch.no_grad():
        output = model(**batch)
    real = batch["attention_mask"].bool()
    values = [value for value in output.values() if isinstance(value, torch.Tensor)]
    assert values
    return [value[real] if value.shape[:2] == real.shape else value for value in values]


def assert_same_outputs(a, b, batches, atol=1e-5):
    for batch in batches:
        for got, want in zip(everything(a, batch), everything(b, batch), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=atol * max(1.0, float(want.abs().max())))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("attention", "padding"), [("sdpa", "left"), ("eager", "left"), ("eager", "right"), ("sdpa", None)])
def test_cut_equals_masked(name, attention, padding):
    model = tiny_model(**MODELS[name], attention=attention)
    small = repaired(model, "unequal", bias="create" if padding is None else "preserve")
    assert_same_outputs(small, written_back(model, small), tiny_batches(model, padding=padding, batches=2))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pattern", KEEPS)
def test_cutting_equals_zeroing(name, pattern):
    model = tiny_model(**MODELS[name])
    keep = keeps(model, pattern)
    assert_same_outputs(cut(model, keep), reference.masked(model, keep), tiny_batches(model, batches=2))


def test_another_mask_is_noticed():
    model = tiny_model("bert")
    with pytest.raises(AssertionError):
        assert_same_outputs(
            cut(model, keeps(model, "first")), reference.masked(model, keeps(model, "unequal")), tiny_batches(model)
        )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pattern", KEEPS)
def test_parameters_fall_by_what_the_layout_says(name, pattern):
    model = tiny_model(**MODELS[name])
    keep, layout = keeps(model, pattern), layout_of(model)
    small = cut(model, keep)
    removed = sum(site.parameters * (site.units - sum(keep[site.kind][site.layer])) for site in layout.sites)
    count = [sum(p.numel() for p in m.parameters()) for m in (model, small)]
    assert count[0] - count[1] == removed > 0
    left = layout.kept_parameters({site.name: sum(keep[site.kind][site.layer]) for site in layout.sites})
    assert left == layout_of(small).parameters == layout.parameters - removed


@pytest.mark.parametrize("name", MODELS)
def test_sizes_on_the_modules_are_right(name):
    model = tiny_model(**MODELS[name])
    keep = keeps(model, "unequal")
    small = cut(model, keep)
    for module in small.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
            assert module.bias is None or module.bias.shape == (module.out_features,)
        if isinstance(module, Conv1D):
            assert module.weight.shape == (module.nx, module.nf)
            assert module.bias.shape == (module.nf,)
    for layer, block in enumerate(reference.blocks(small)):
        heads, neurons = sum(keep["heads"][layer]), sum(keep["neurons"][layer])
        if model.config.model_type == "bert":
            attention = block.attention.self
            assert (attention.num_attention_heads, attention.all_head_size, attention.attention_head_size) == (
                heads,
                8 * heads,
                8,
            )
            assert block.intermediate.dense.out_features == neurons
        elif model.config.model_type == "gpt2":
            assert (block.attn.num_heads, block.attn.split_size, block.attn.head_dim) == (heads, 8 * heads, 8)
            assert (block.mlp.c_fc.nf, block.attn.c_attn.nf) == (neurons, 24 * heads)
        else:
            assert block.mlp.intermediate_size == block.mlp.down_proj.in_features == neurons
            attention = block.self_attn
            assert attention.k_proj.out_features == attention.head_dim * heads
            assert attention.q_proj.out_features == attention.head_dim * heads * attention.num_key_value_groups


def layers():
    """Two layers that compute the same, stored the two ways."""
    linear, conv = nn.Linear(4, 3), Conv1D(3, 4)
    conv.weight.data.copy_(linear.weight.data.T)
    conv.bias.data.copy_(linear.bias.data)
    return {"linear": linear, "conv1d": conv}


@pytest.mark.parametrize("name", ["linear", "conv1d"])
def test_a_layer_is_cut_by_rows_or_columns(name):
    layer = layers()[name]
    dense = LayerView.of(copy.deepcopy(layer))
    outputs, inputs = LayerView.of(copy.deepcopy(layer)), LayerView.of(copy.deepcopy(layer))
    outputs.weight.requires_grad_(False)
    before = outputs.weight
    outputs.select("out", torch.tensor([0, 2]))
    assert outputs.weight is not before, "parameters are replaced: the old ones may be shared"
    assert torch.equal(outputs.matrix, dense.matrix[:, [0, 2]])
    assert torch.equal(outputs.bias, dense.bias[[0, 2]])
    assert (outputs.size("in"), outputs.size("out")) == (4, 2)
    assert not outputs.weight.requires_grad
    inputs.select("in", torch.tensor([1]))
    assert torch.equal(inputs.matrix, dense.matrix[[1]])
    assert torch.equal(inputs.bias, dense.bias)
    assert (inputs.size("in"), inputs.size("out")) == (1, 3)
    x = torch.randn(2, 1)
    torch.testing.assert_close(inputs.module(x), x @ dense.matrix[[1]] + dense.bias)


@pytest.mark.parametrize("name", ["linear", "conv1d"])
def test_a_written_matrix_is_what_the_layer_computes(name):
    view = LayerView.of(layers()[name])
    assert torch.equal(view.initial_weights()[0], view.matrix.double())
    matrix, bias, x = torch.randn(4, 3).double(), torch.randn(3).double(), torch.randn(5, 4)
    view.write(matrix, bias)
    torch.testing.assert_close(view.module(x), x @ matrix.float() + bias.float())
    with pytest.raises(liar.LiarError, match=r"do not fit into torch\.float32: use bfloat16 or float32"):
        view.write(matrix * 1e300, bias)
    torch.testing.assert_close(view.matrix, matrix.float())


@pytest.mark.parametrize("name", ["linear", "conv1d"])
def test_a_written_matrix_is_the_layers_own(name):
    """The caller may go on with its tensors, even where they have the layer's dtype already."""
    view = LayerView.of(layers()[name])
    matrix, bias = torch.randn(4, 3), torch.randn(3)
    view.write(matrix, bias)
    before = view.matrix.clone(), view.bias.clone()
    matrix.zero_()
    bias.zero_()
    assert torch.equal(view.matrix, before[0])
    assert torch.equal(view.bias, before[1])


def test_a_bias_is_written_only_where_there_is_one_or_one_is_created():
    view = LayerView.of(nn.Linear(4, 3, bias=False))
    weight, bias = view.initial_weights()
    assert torch.equal(bias, torch.zeros(3).double())
    view.write(weight, bias + 1)
    assert view.bias is None
    view.write(weight, bias + 1, create_bias=True)
    assert torch.equal(view.bias, torch.ones(3))


def test_an_edge_turns_units_into_channels():
    unit_mask = torch.tensor([True, False, True])
    assert Edge("q", "out", (Segment(0, 1, 1),)).channels(unit_mask).tolist() == [0, 2]
    assert Edge("q", "out", (Segment(0, 2, 2),)).channels(unit_mask).tolist() == [0, 1, 4, 5]
    # Side by side: all queries, then all keys.
    fused = Edge("qk", "out", (Segment(0, 2, 2), Segment(6, 2, 2)))
    assert fused.channels(unit_mask).tolist() == [0, 1, 4, 5, 6, 7, 10, 11]
    assert fused.by_unit(3).tolist() == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    assert fused.width == 4
    # Interleaved: query and key of a unit, then those of the next; here of the keys only.
    assert Edge("qk", "out", (Segment(2, 2, 4),)).channels(unit_mask).tolist() == [2, 3, 10, 11]


def test_a_copied_block_shares_memory_and_leaves_the_original_alone():
    model = tiny_model("bert")
    block, layout = model.encoder.layer[0], layout_of(model)
    before = copy.deepcopy(model.state_dict())
    pruned_block = copy_block(block)
    assert all(a is b for a, b in zip(block.parameters(), pruned_block.parameters(), strict=True))
    assert all(a is not b for a, b in zip(block.modules(), pruned_block.modules(), strict=True))
    for site in layout.of_block(layout.blocks[0]):
        cut_site(pruned_block, site, torch.arange(site.units) == 1)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert layout_of(model) == layout


@pytest.mark.parametrize("padding", ["left", None])
@pytest.mark.parametrize("name", ["llama-lm", "llama-8q-2kv", "llama-4q-1kv", "llama-wide-heads"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_generation_with_a_cache_equals_generation_without(name, padding, attention):
    """Layers of a cut model have different numbers of key and value heads, so their caches have different widths."""
    model = tiny_model(**MODELS[name], attention=attention)
    small = repaired(model, "unequal")
    widths = {block.self_attn.k_proj.out_features for block in reference.blocks(small)}
    assert len(widths) == (1 if name == "llama-4q-1kv" else 2) or reference.units(model, "heads") == 2
    batch = tiny_batches(small, batches=1, sequences=3, padding=padding)[0]
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached = small.generate(**batch, use_cache=True, **options)
    assert cached.shape == (3, 24)
    assert torch.equal(cached, small.generate(**batch, use_cache=False, **options))
    if padding is None:
        ids = batch["input_ids"]
        for _ in range(12):
            with torch.no_grad():
                ids = torch.cat([ids, small(ids).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(cached, ids)


def test_a_cut_in_only_one_layer_generates():
    model = tiny_model("llama", head="causal-lm", num_key_value_heads=4)
    small = repaired(model, "one_layer_only")
    widths = [block.self_attn.k_proj.out_features for block in reference.blocks(small)]
    assert widths == [32, 16]
    ids = tiny_batches(small, padding=None)[0]["input_ids"][:2]
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(small.generate(ids, **options), small.generate(ids, use_cache=False, **options))


TEXTS = ["w3 w5 w7", "w8 w2"]


@pytest.mark.parametrize("pattern", ["unequal", "every_other"])
def test_pipeline_feature_extraction(tokenizer, pattern):
    model = tiny_model("bert")
    small = repaired(model, pattern)
    found = pipeline("feature-extraction", model=small, tokenizer=tokenizer)(TEXTS)
    full = pipeline("feature-extraction", model=written_back(model, small, pattern), tokenizer=tokenizer)(TEXTS)
    for got, want in zip(found, full, strict=True):
        torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-4, atol=1e-4)


def test_pipeline_text_classification(tokenizer):
    model = tiny_model("bert", head="sequence-classification")
    small = repaired(model)
    found = pipeline("text-classification", model=small, tokenizer=tokenizer)(TEXTS)
    full = pipeline("text-classification", model=written_back(model, small), tokenizer=tokenizer)(TEXTS)
    for got, want in zip(found, full, strict=True):
        assert got["label"] == want["label"]
        assert got["score"] == pytest.approx(want["score"], abs=1e-4)


def test_pipeline_text_generation(plain_tokenizer):
    model = tiny_model("llama", head="causal-lm")
    small = repaired(model)
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    found, full = (
        pipeline("text-generation", model=each, tokenizer=plain_tokenizer)(TEXTS, **options)
        for each in (small, written_back(model, small))
    )
    assert found == full
    assert found[0][0]["generated_text"]


@pytest.mark.parametrize("name", ["bert-classifier", "llama-classifier"])
def test_trainer_fine_tunes_a_cut_model(name, tmp_path):
    model = tiny_model(**MODELS[name])
    model.config.pad_token_id = 0
    small = repaired(model)
    before = copy.deepcopy(small.state_dict())
    batch = tiny_batches(small, batches=1)[0]
    rows = [
        {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(number % 2)}
        for number, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True))
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    assert torch.isfinite(torch.tensor(Trainer(model=small, args=arguments, train_dataset=rows).train().training_loss))
    moved = [name for name, value in small.state_dict().items() if not torch.equal(value.cpu(), before[name])]
    consumers = [site.module for site in layout_of(small).sites]
    assert all(f"{consumer}.weight" in moved for consumer in consumers)


@pytest.mark.parametrize("model_type", ["bert", "llama", "gpt2"])
def test_gradients_reach_every_cut_layer(model_type):
    small = repaired(tiny_model(model_type))
    everything_ = small(**tiny_batches(small)[0])[0].square().sum()
    everything_.backward()
    for site in layout_of(small).sites:
        for edge in site.edges:
            weight = small.get_submodule(f"{site.block}.{edge.module}").weight
            assert weight.grad.abs().sum() > 0
            assert weight.grad.shape == weight.shape


@pytest.mark.parametrize("model_type", ["bert", "llama", "gpt2"])
def test_compile_traces_a_whole_cut_model(model_type):
    small = repaired(tiny_model(model_type))
    batch = tiny_batches(small)[0]
    torch.compiler.reset()
    with torch.no_grad():
        got = torch.compile(small, backend="eager", fullgraph=True)(**batch)[0][batch["attention_mask"].bool()]
    torch.testing.assert_close(got, everything(small, batch)[0], rtol=1e-4, atol=1e-4)


def test_compile_with_the_real_back_end():
    """It takes seconds for every kernel, so only one attention is compiled, the part whose shapes slimming changes most."""
    small = repaired(tiny_model("bert", num_hidden_layers=1))
    batch = tiny_batches(small)[0]
    want = everything(small, batch)[0]
    torch.compiler.reset()
    small.encoder.layer[0].attention.compile(backend="inductor")
    try:
        got = everything(small, batch)[0]
    except torch._inductor.exc.InductorError as error:
        if "compiler" not in str(error).lower():
            raise
        pytest.skip(f"inductor finds no C++ compiler here: {str(error)[:80]}")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_deepcopy_and_state_dict_of_a_cut_model():
    small = repaired(tiny_model("bert"))
    other = copy.deepcopy(small)
    other.load_state_dict(small.state_dict())
    assert_same_outputs(other, small, tiny_batches(small), atol=0)


# The configuration


@pytest.mark.parametrize("name", ["llama-lm", "llama-8q-2kv", "llama-wide-heads"])
def test_equal_layers_are_a_stock_model(name):
    """Where every layer keeps as many units, the configuration alone builds the cut model's shapes."""
    model = tiny_model(**MODELS[name])
    keep = {"heads": [[True, False]] * 2, "neurons": [[unit % 2 == 0 for unit in range(64)]] * 2}
    liar.reconstruct(model, keep, tiny_batches(model), progress=False)
    built = type(model)(model.config)
    assert stock.shapes(built) == stock.shapes(model)
    assert model.config.intermediate_size == 32
    assert model.config.num_key_value_heads == 1
    built.load_state_dict(model.state_dict())
    assert_same_outputs(built.eval(), model, tiny_batches(model))


def test_bert_neurons_are_a_stock_model_and_heads_are_not():
    """A BERT configuration ties the width of a head to the number of heads, so it cannot say what a cut model is."""
    model = tiny_model("bert")
    neurons = {"neurons": [[unit % 2 == 0 for unit in range(64)]] * 2}
    liar.reconstruct(model, neurons, tiny_batches(model), progress=False)
    assert uniform_sizes(model) == {"num_attention_heads": 4, "intermediate_size": 32}
    assert model.config.intermediate_size == 32
    liar.reconstruct(model, {"heads": [[0, 2], [1, 3]]}, tiny_batches(model), progress=False)
    assert uniform_sizes(model) is None
    assert model.config.num_attention_heads == 4


def test_unequal_layers_leave_the_configuration_alone():
    model = tiny_model("llama")
    before = model.config.to_dict()
    small = repaired(model)
    assert uniform_sizes(small) is None
    assert small.config.to_dict() == before


def test_a_size_that_is_left_to_its_default_stays_so():
    """GPT-2's `n_inner`, until neurons are removed."""
    model = tiny_model("gpt2", n_inner=None)
    small = copy.deepcopy(model)
    liar.remove(model, {})
    assert model.config.n_inner is None
    liar.remove(small, {"neurons": [list(range(20))] * 2})
    assert small.config.n_inner == 20


def test_uniform_sizes_leaves_the_random_state_alone():
    model = tiny_model("llama")
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert uniform_sizes(model) is not None
    assert torch.equal(torch.get_rng_state(), state)
