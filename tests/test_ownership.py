"""The one gate before any work: wrapped, shared, quantised and patched models are refused by every verb, untouched."""

import copy
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import liar
from liar.errors import ModelError
from liar.models import layer_of, layout_of
from liar.testing import tiny_batches, tiny_model

VERBS = {
    "discover": lambda m, b: liar.discover(m),
    "remove": lambda m, b: liar.remove(m, {}),
    "select": lambda m, b: liar.select(m, keep=0.5, criterion="magnitude"),
    "collect": lambda m, b: liar.collect(m, b, criteria=["wanda"], progress=False),
    "reconstruct": lambda m, b: liar.reconstruct(m, {}, b, progress=False),
    "prune": lambda m, b: liar.prune(m, b, keep=0.5, progress=False),
    "moments": lambda m, b: liar.moments(m, b, progress=False),
    "latency": lambda m, b: liar.latency(m, length=4, progress=False),
}


class PeftModelForCausalLM(nn.Module):
    """Shaped as PEFT's class of this name, which need not be installed: known by the name of a class it derives from."""

    def __init__(self, model):
        super().__init__()
        self.base_model, self.config = model, model.config


class PeftModel(PeftModelForCausalLM):
    pass


def compiled_layer(model):
    model.base_model.layers[1] = torch.compile(model.base_model.layers[1], backend="eager")
    return model


def last_layers(model):
    return [layer_of(model.get_submodule(site.block), site.consumer).module for site in layout_of(model).sites]


def changed(change):
    def apply(model):
        change(last_layers(model)[-1])
        return model

    return apply


def tied_inside(model):
    first = model.base_model.layers[0].self_attn
    first.k_proj.weight = first.v_proj.weight
    return model


def tied_across(model):
    layers = model.base_model.layers
    layers[1].mlp.down_proj.weight = layers[0].mlp.down_proj.weight
    return model


def same_memory(model):
    layers = model.base_model.layers
    layers[1].mlp.up_proj.weight = nn.Parameter(layers[0].mlp.up_proj.weight.data)
    return model


def method(module):
    module.forward = types.MethodType(lambda self, *args, **kwargs: type(self).forward(self, *args, **kwargs), module)
    return module


def patched(name):
    def apply(model):
        method(model.get_submodule(name))
        return model

    return apply


class Quantised(torch.Tensor):
    """As torchao's tensors: a subclass that says it is of a float type."""


def quantised(layer):
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Quantised))


def tied_biases(model):
    layers = model.base_model.layers
    layers[1].mlp.up_proj.bias = layers[0].mlp.up_proj.bias
    return model


def transposed(model):
    attention = model.base_model.layers[0].self_attn
    attention.o_proj.weight = nn.Parameter(attention.q_proj.weight.data.T)
    return model


CASES = {
    "a transposed view": (transposed, r"q_proj\.weight and .*o_proj\.weight are one parameter"),
    "a bias pruned with masks": (
        changed(lambda each: prune.random_unstructured(each, "bias", 0.3)),
        r"weight or bias of .* is computed from other parameters",
    ),
    "tied biases": (tied_biases, r"up_proj\.bias and .*up_proj\.bias are one parameter"),
    "DataParallel": (nn.DataParallel, r"unwrap it: pass model\.module"),
    "compiled": (lambda m: torch.compile(m, backend="eager"), r"pass model\._orig_mod"),
    "a compiled layer": (compiled_layer, r"layers\.1 is a OptimizedModule"),
    "PEFT": (PeftModel, r"merge_and_unload"),
    "pruned with masks": (changed(lambda each: prune.l1_unstructured(each, "weight", 0.3)), r"prune\.remove"),
    "weight norm": (changed(parametrizations.weight_norm), "remove_parametrizations"),
    "sparse": (changed(lambda each: setattr(each, "weight", nn.Parameter(each.weight.detach().to_sparse()))), "Quantised or"),
    "a subclass of tensor": (changed(quantised), "Quantised or wrapped"),
    "tied inside a block": (tied_inside, r"k_proj\.weight and .*v_proj\.weight are one parameter"),
    "tied across blocks": (tied_across, "are one parameter: it cannot be cut in one place only"),
    "parameters in one memory": (same_memory, r"0\.mlp\.up_proj\.weight and .*1\.mlp\.up_proj\.weight are one"),
    "forward of a block": (patched("model.layers.1"), r"layers\.1 has a forward of its own"),
    "forward inside a block": (patched("model.layers.0.mlp"), r"layers\.0\.mlp has a forward of its own"),
    "nothing": (lambda m: None, "expected a Hugging Face model, got a NoneType"),
    "a name": (lambda m: "bert-base-uncased", "got a str; read a folder with liar.load"),
    "no model of transformers": (lambda m: nn.Linear(2, 2), "a Linear without config.model_type"),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_owned_is_refused_before_any_work(case, verb):
    make, message = CASES[case]
    plain = tiny_model("llama", head="causal-lm", mlp_bias=True)
    batches = tiny_batches(plain)
    model = make(plain)
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    attributes = [dict(vars(module)) for module in plain.modules()]
    with pytest.raises(ModelError, match=message):
        VERBS[verb](model, batches)
    assert [dict(vars(module)) for module in plain.modules()] == attributes
    assert all(torch.equal(_dense(value), _dense(before[name])) for name, value in plain.state_dict().items())


def _dense(value):
    return value.to_dense() if value.is_sparse else value


def test_saving_is_refused_too(tmp_path):
    for case in ("compiled", "tied across blocks", "forward of a block", "nothing"):
        make, message = CASES[case]
        with pytest.raises(ModelError, match=message):
            liar.save(make(tiny_model("llama", head="causal-lm")), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("head", [None, "causal-lm"])
def test_what_was_made_permanent_or_unwrapped_is_taken(head):
    """Negative control: the same models after what the messages say to do."""
    model = tiny_model("llama", head=head)
    batches = tiny_batches(model)
    first, *_, last = last_layers(model)
    prune.l1_unstructured(last, "weight", 0.3)
    prune.remove(last, "weight")
    parametrizations.weight_norm(first)
    torch.nn.utils.parametrize.remove_parametrizations(first, "weight")
    method(model.base_model.layers[0].mlp)
    del model.base_model.layers[0].mlp.forward
    wrapped = torch.compile(nn.DataParallel(model).module, backend="eager")
    report = liar.prune(wrapped._orig_mod, batches, keep=0.5, progress=False)
    assert report.achieved <= 0.5


def test_a_forward_of_the_whole_model_may_be_its_own():
    """Autocast wrappers and the like stand outside of the blocks; results are as without."""
    plain = tiny_model("llama", head="causal-lm")
    patched_model = method(copy.deepcopy(plain))
    batches = tiny_batches(plain)
    for model in (plain, patched_model):
        liar.prune(model, batches, keep=0.5, progress=False)
    values = zip(plain.state_dict().values(), patched_model.state_dict().values(), strict=True)
    assert all(torch.equal(*pair) for pair in values)


def test_attention_that_a_device_does_not_have():
    """Not the batch's fault."""
    model = tiny_model("bert")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ModelError, match=r"attn_implementation='flex_attention' stops .*set_attn_implementation\(\"sdpa\"\)"):
        liar.prune(model, tiny_batches(model), keep=0.5, progress=False)
    model.set_attn_implementation("sdpa")
    liar.prune(model, tiny_batches(model), keep=0.5, progress=False)


def test_hooks_of_accelerate():
    """Those that do more than to bring in weights; for the others see test_offload.py."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = tiny_model("llama", head="causal-lm")
    batches, layer = tiny_batches(model), model.model.layers[0].mlp
    hooks.add_hook_to_module(layer, hooks.CpuOffload("cpu"))
    with pytest.raises(ModelError, match=r"layers\.0\.mlp has a forward of its own.*remove_hook_from_module"):
        liar.prune(model, batches, keep=0.5, progress=False)
    hooks.remove_hook_from_module(model, recurse=True)
    assert liar.prune(model, batches, keep=0.5, progress=False).achieved <= 0.5


def test_tied_embeddings_are_no_shared_layers():
    model = tiny_model("llama", head="causal-lm", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert liar.prune(model, tiny_batches(model), keep=0.5, progress=False).achieved <= 0.5


def test_parameters_of_the_blocks_count_once():
    model = tiny_model("llama")
    whole = layout_of(model).parameters
    norms = [layer.input_layernorm for layer in model.layers]
    norms[1].weight = norms[0].weight
    assert layout_of(model).parameters == whole - norms[0].weight.numel()
