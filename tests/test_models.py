"""The contract of every family, shown to be sharp by tables that are wrong in one place each."""

from dataclasses import replace

import pytest
import torch
import transformers
from cases import MODELS
from torch import nn
from transformers import BertConfig, BertModel

import liar
from liar.errors import ModelError
from liar.models import LayerView, family_of, layer_of, layout_of
from liar.models.tables.bert import BERT
from liar.models.tables.gpt2 import GPT2
from liar.models.tables.gptj import GPTJ
from liar.models.tables.llama import GEMMA2, GPT_OSS, GRANITE, LLAMA
from liar.models.tables.modernbert import MODERNBERT
from liar.models.tables.mpnet import MPNET
from liar.testing import assert_same_state, check_family, model_state, tiny_batches, tiny_model

FAMILIES = {family.model_type: family for family in (BERT, GPT2, LLAMA)}
# Of what cannot be cut, so that it is built in no time.
TINY = {
    "albert": {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 16, "vocab_size": 20},
    "mamba": {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 20},
    "t5": {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_heads": 2, "num_layers": 1, "vocab_size": 20},
}


@pytest.mark.parametrize("name", MODELS)
def test_every_variant_passes_the_contract(name):
    model = tiny_model(**MODELS[name])
    before = model_state(model)
    check_family(model)
    assert_same_state(model, before)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("changes", [{"attention": "eager"}, {"dtype": torch.bfloat16}, {"num_hidden_layers": 1}, {"seed": 7}])
def test_the_contract_holds_for_other_models_of_a_family(model_type, changes):
    check_family(tiny_model(model_type, **changes))


@pytest.mark.parametrize("padding", ["left", "right", None])
def test_the_contract_takes_batches(padding):
    model = tiny_model("llama")
    check_family(model, tiny_batches(model, batches=5, sequences=16, padding=padding))
    with pytest.raises(AssertionError, match="at least two batches"):
        check_family(model, tiny_batches(model, batches=1))


def with_pattern(family, kind, **changes):
    return replace(family, patterns=tuple(replace(p, **changes) if p.kind == kind else p for p in family.patterns))


# Tables that are wrong in one place -> what the contract says about it
WRONG = {
    "bert residual of heads": (with_pattern(BERT, "heads", residual=("attention.output", 0)), "heads.0: .*check residual"),
    "bert residual of neurons": (with_pattern(BERT, "neurons", residual=("output", 0)), "neurons.0: .*check residual"),
    "bert residual too early": (with_pattern(BERT, "neurons", residual=("attention.output", 1)), "neurons.0: .*check residual"),
    "llama residual of heads": (
        with_pattern(LLAMA, "heads", residual=("post_attention_layernorm", 0)),
        "heads.0: .*check residual",
    ),
    "llama residual of neurons": (
        with_pattern(LLAMA, "neurons", residual=("input_layernorm", 0)),
        "neurons.0: .*check residual",
    ),
    "llama residual behind the norm": (with_pattern(LLAMA, "neurons", residual=("mlp", 0)), "neurons.0: .*check residual"),
    "gpt2 residual of neurons": (with_pattern(GPT2, "neurons", residual=("ln_1", 0)), "neurons.0: .*check residual"),
    "sublayer with a norm": (
        with_pattern(BERT, "heads", sublayer="attention.output"),
        "sublayer: replaying it gives other weights",
    ),
    "sublayer of another part": (with_pattern(LLAMA, "heads", sublayer="mlp"), "sublayer: "),
    "bert is not pre-norm": (replace(BERT, is_pre_norm=True), "0% comes out of the block.*is_pre_norm=True"),
    "llama is not post-norm": (replace(LLAMA, is_pre_norm=False), "100% comes out of the block.*is_pre_norm=False"),
    "llama is not parallel": (replace(LLAMA, is_parallel=True), "neurons.0: .*check residual.*is_parallel"),
    "gpt2 is not parallel": (replace(GPT2, is_parallel=True), "neurons.0: .*check residual.*is_parallel"),
    "two parts in place of three": (
        with_pattern(GPT2, "heads", producers=(liar.FusedProducer("attn.c_attn", 2),)),
        "cut model does not run|cutting differs from zeroing",
    ),
    "not fused": (
        with_pattern(GPT2, "heads", producers=("attn.c_attn",)),
        "cut model does not run|cutting differs from zeroing",
    ),
    "split size of gpt2": (with_pattern(GPT2, "heads", size_attributes=("attn.num_heads",)), "cut model does not run"),
    "single query heads": (
        with_pattern(LLAMA, "heads", group_size=None),
        "cannot be divided|cut model does not run|cutting differs from zeroing",
    ),
    "order": (replace(BERT, patterns=BERT.patterns[::-1]), "passes the sites in the order .*the table says"),
    "forgotten gate": (with_pattern(LLAMA, "neurons", producers=("mlp.up_proj",)), "cut model does not run.*check producers"),
    "forgotten value": (
        with_pattern(BERT, "heads", producers=("attention.self.query", "attention.self.key")),
        "cut model does not run.*check producers",
    ),
    "a producer too many": (
        with_pattern(BERT, "neurons", producers=("attention.self.value", "intermediate.dense")),
        "attention.self.value has 32 output channels, which cannot be divided among 64 units",
    ),
    "another consumer": (
        with_pattern(BERT, "neurons", consumer="attention.output.dense"),
        "cut model does not run|cutting differs|check residual",
    ),
    "half a head": (
        with_pattern(BERT, "heads", unit_width="attention.self.num_attention_heads"),
        "check unit_width",
    ),
    "single channels of heads": (
        with_pattern(LLAMA, "heads", unit_width=None),
        "cut model does not run|cutting differs from zeroing",
    ),
    "size attributes of llama": (
        with_pattern(LLAMA, "neurons", size_attributes=()),
        "mlp.intermediate_size goes with the number of units",
    ),
    "size attributes of bert": (
        with_pattern(BERT, "heads", size_attributes=("attention.self.all_head_size",)),
        "attention.self.num_attention_heads goes with the number of units",
    ),
    "no scale": (with_pattern(GRANITE, "heads", output_scale=None), "heads.0: .*output_scale"),
    "another scale": (
        with_pattern(GRANITE, "neurons", output_scale="self_attn.scaling"),
        "neurons.0: .*output_scale",
    ),
    "no norm": (with_pattern(GEMMA2, "neurons", output_norm=None), "neurons.0: .*output_norm"),
    "another norm": (with_pattern(GEMMA2, "heads", output_norm="pre_feedforward_layernorm"), "heads.0: .*output_norm"),
    "no sinks": (with_pattern(GPT_OSS, "heads", unit_parameters=()), "cut model does not run.*unit_parameters"),
    "no bias by head": (with_pattern(MPNET, "heads", head_argument=None), "cut model does not run.*head_argument"),
    "bias of another dimension": (
        with_pattern(MPNET, "heads", head_argument=replace(MPNET.patterns[0].head_argument, dim=2)),
        "cut model does not run.*head_argument",
    ),
    "gate and input are one": (
        with_pattern(MODERNBERT, "neurons", producers=("mlp.Wi",)),
        "cutting differs from zeroing|the cut model does not run",
    ),
    "config keys": (with_pattern(BERT, "neurons", config_keys=("hidden_units",)), "the configuration has no 'hidden_units'"),
    "config keys of another kind": (
        with_pattern(LLAMA, "neurons", config_keys=("vocab_size",)),
        "should make 32 units of 64, made 64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_table_fails_the_contract(name, registry):
    family, says = WRONG[name]
    liar.register(family)
    sizes = {"num_key_value_heads": 4} if family.model_type == "llama" and name != "single query heads" else {}
    with pytest.raises((AssertionError, ModelError), match=f"(?s){says}"):
        check_family(tiny_model(family.model_type, **sizes))


@pytest.mark.parametrize(
    ("family", "says"),
    [
        (replace(BERT, blocks="encoder.layers"), "table of family 'bert' does not fit this BertModel.*layers"),
        (replace(BERT, blocks="pooler"), "does not fit this BertModel"),
        (with_pattern(BERT, "neurons", consumer="output.linear"), "does not fit this BertModel.*linear"),
        (with_pattern(BERT, "heads", unit_width="attention.self.size"), "does not fit this BertModel.*size"),
        (
            with_pattern(BERT, "neurons", consumer="output.LayerNorm"),
            r"layer\.0\.output\.LayerNorm is a LayerNorm, expected Linear or Conv1D",
        ),
    ],
)  # fmt: skip
def test_names_that_are_not_there(family, says, registry):
    liar.register(family)
    with pytest.raises(ModelError, match=f"(?s){says}"):
        layout_of(tiny_model("bert"))


def test_a_path_is_no_model():
    with pytest.raises(ModelError, match=r"expected a Hugging Face model, got a str; read a folder with liar\.load"):
        liar.select("bert-base", keep=0.5, criterion="magnitude")


def test_a_family_of_ones_own(registry):
    """What docs/extending.md promises: a table, `register`, and everything works."""

    class OwnConfig(BertConfig):
        model_type = "own"

    with pytest.raises(ModelError, match=r"known family, got config.model_type='own'; `liar families` lists"):
        layout_of(BertModel(OwnConfig(num_hidden_layers=1)))
    liar.register(replace(BERT, model_type="own"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(
            OwnConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
        )
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    assert family_of(model).model_type == "own"
    check_family(model)
    assert liar.prune(model, tiny_batches(model), keep=0.5, progress=False).achieved <= 0.5


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (tiny_model("biogpt"), "got config.model_type='biogpt'.*among them"),
        (nn.Linear(2, 2), "got a Linear without config.model_type"),
        (nn.Sequential(), "got a Sequential without config.model_type"),
    ],
)
def test_unknown_families(model, says):
    for call in (layout_of, lambda m: liar.select(m, keep=0.5, criterion="random")):
        with pytest.raises(ModelError, match=f"expected a model of a known family, {says}.*liar.register"):
            call(model)


@pytest.mark.parametrize(("model_type", "says"), [("albert", "share one block"), ("mamba", "recurrence")])
def test_what_cannot_be_cut_is_told_why(model_type, says):
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(model_type, **TINY.get(model_type, {})))
    with pytest.raises(ModelError, match=f"config.model_type='{model_type}' cannot be cut: .*{says}"):
        layout_of(model)


@pytest.mark.parametrize(
    ("model_type", "entries"),
    [
        ("stablelm", {"qk_layernorm": True}),
        ("phi", {"qk_layernorm": True}),
        ("bloom", {"apply_residual_connection_post_layernorm": True}),
    ],
)
def test_other_blocks_than_the_table_describes_are_refused(model_type, entries):
    ((name, value),) = entries.items()
    with pytest.raises(ModelError, match=f"with {name}={not value} in their configuration, got {value}, .*liar.register"):
        layout_of(tiny_model(model_type, **entries))


@pytest.mark.parametrize("parallel", [True, False])
def test_the_configuration_says_whether_a_block_is_parallel(parallel):
    layout = check_family(tiny_model("gpt_neox", use_parallel_residual=parallel))
    assert layout["neurons.0"].added_before == (("attention.dense",) if parallel else ())


def test_a_configuration_that_does_not_say_it(registry):
    liar.register(replace(BERT, is_parallel="parallel"))
    with pytest.raises(ModelError, match=r"names the entry 'parallel' .* as is_parallel: expected True or False"):
        layout_of(tiny_model("bert"))


# Layouts in numbers


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("bert")])
def test_bert_in_numbers(name):
    layout = layout_of(tiny_model(**MODELS[name]))
    prefix = "" if name == "bert" else "bert."
    assert [site.name for site in layout.sites] == ["heads.0", "neurons.0", "heads.1", "neurons.1"]
    heads, neurons = layout["heads.1"], layout["neurons.1"]
    assert heads.module == f"{prefix}encoder.layer.1.attention.output.dense"
    assert (heads.units, heads.consumer.width, heads.query_heads, heads.out) == (4, 8, 1, 32)
    # a head: 8 rows of query, key, value (32 weights and a bias each) and 8 columns of the output
    assert heads.parameters == 3 * 8 * 33 + 8 * 32
    assert (neurons.units, neurons.consumer.width, neurons.parameters) == (64, 1, 33 + 32)
    per_block = 4 * (32 * 32 + 32) + 2 * 32 * 64 + 64 + 32 + 4 * 32
    assert layout.parameters == 2 * per_block
    assert layout.uncovered == ()


@pytest.mark.parametrize(
    ("queries", "pairs", "head_dim", "bias"),
    [(8, 2, 4, False), (4, 4, 8, False), (4, 1, 8, False), (4, 2, 12, False), (8, 2, 4, True)],
)
def test_llama_in_numbers(queries, pairs, head_dim, bias):
    model = tiny_model("llama", head="causal-lm", num_attention_heads=queries, num_key_value_heads=pairs, head_dim=head_dim,
                       attention_bias=bias, mlp_bias=bias)  # fmt: skip
    layout = layout_of(model)
    heads, neurons = layout["heads.0"], layout["neurons.0"]
    group = queries // pairs
    assert (heads.units, heads.query_heads, heads.consumer.width) == (pairs, group, group * head_dim)
    assert [edge.width for edge in heads.producers] == [group * head_dim, head_dim, head_dim]
    assert heads.parameters == (group + 2) * head_dim * (32 + bias) + group * head_dim * 32
    assert (neurons.units, neurons.parameters) == (64, 2 * (32 + bias) + 32)
    assert heads.module == "model.layers.0.self_attn.o_proj"
    assert layout.parameters == sum(p.numel() for p in model.model.layers.parameters())


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_gpt2_in_numbers(heads):
    """Conv1D keeps its weight as [in, out], and one layer computes query, key and value side by side."""
    layout = layout_of(tiny_model("gpt2", num_attention_heads=heads, n_inner=48))
    attention, neurons = layout["heads.1"], layout["neurons.1"]
    size = 32 // heads
    assert (attention.units, attention.query_heads, attention.consumer.width, attention.out) == (heads, 1, size, 32)
    (fused,) = attention.producers
    assert [(segment.offset, segment.width, segment.stride) for segment in fused.segments] == [
        (0, size, size),
        (32, size, size),
        (64, size, size),
    ]
    assert attention.parameters == 3 * size * 33 + size * 32
    assert (neurons.units, neurons.parameters) == (48, 33 + 32)
    assert layout.is_pre_norm
    assert layout.uncovered == ()


def test_a_parallel_block_passes_the_contract(registry):
    """Attention and feed-forward part read the same stream; declared sequential, the same table is refused."""
    model = tiny_model("gptj")
    assert check_family(model)["neurons.0"].added_before == ("attn.out_proj",)
    for criterion in liar.selection.CRITERIA:
        labelled = [{**batch, "labels": batch["input_ids"]} for batch in tiny_batches(model)]
        mask = liar.select(
            tiny_model("gptj", head="causal-lm"),
            labelled,
            keep=0.6,
            criterion=criterion,
            progress=False,
        )
        assert 0.4 < mask.parameters(layout_of(model)) / layout_of(model).parameters <= 0.6
    liar.register(replace(GPTJ, is_parallel=False))
    with pytest.raises(AssertionError, match=r"heads\.0: .*check residual.*is_parallel"):
        check_family(model)


def test_half_a_table_says_what_it_says(registry):
    """Where there is one site in a block, the contract still finds out whether the block is pre-norm."""
    heads = replace(LLAMA, patterns=LLAMA.patterns[:1])
    liar.register(heads)
    check_family(tiny_model("llama"))
    liar.register(replace(heads, is_pre_norm=False))
    with pytest.raises(AssertionError, match="100% comes out of the block"):
        check_family(tiny_model("llama"))


def test_cross_attention_is_left_alone():
    layout = check_family(tiny_model("gpt2", add_cross_attention=True, is_decoder=True))
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in layout.uncovered} == {"crossattention"}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: replace(BERT.patterns[0], kind="head"), "kind='head': expected one of 'heads', 'neurons'"),
        (lambda: with_pattern(BERT, "heads", producers="mlp"), "producers='mlp': expected a tuple of names, got a str"),
        (lambda: with_pattern(BERT, "heads", config_keys="n"), "config_keys='n': expected a tuple of names"),
        (lambda: with_pattern(BERT, "heads", residual="ln"), "residual='ln': expected \\(module, index"),
        (lambda: replace(BERT, patterns=BERT.patterns[0]), "patterns of 'bert': expected a tuple of SitePattern"),
        (lambda: liar.register("opt"), "expected a liar.Family, got a str"),
    ],
)
def test_entries_of_the_wrong_type(wrong, says, registry):
    with pytest.raises(ModelError, match=says):
        wrong()


def test_two_patterns_of_one_kind_are_refused(registry):
    liar.register(replace(BERT, patterns=(BERT.patterns[0], replace(BERT.patterns[1], kind="heads"))))
    with pytest.raises(ModelError, match="two patterns of one kind"):
        layout_of(tiny_model("bert"))


def test_shared_heads_where_none_are_shared_fail_the_contract(registry):
    """Cutting would be right, but all heads would be one unit, of which none can go."""
    liar.register(with_pattern(BERT, "heads", group_size="attention.self.num_attention_heads"))
    with pytest.raises(AssertionError, match=r"heads\.0: 4 query heads are said to share .* check group_size"):
        check_family(tiny_model("bert"))


def test_a_model_that_mixes_tokens_and_sequences_fails_the_contract():
    model = tiny_model("bert")
    for layer in model.encoder.layer:
        layer.intermediate.register_forward_pre_hook(lambda _module, args: (args[0].view(8, 32, -1),))
        layer.output.register_forward_pre_hook(lambda _module, args: (args[0], args[1].view(8, 32, -1)))
        layer.output.register_forward_hook(lambda _module, _args, output: output.view(16, 16, -1))
    with pytest.raises(AssertionError, match=r"neurons\.0: output\.dense gives a tensor \[8, 32, 32\], expected \[sequences"):
        check_family(model)


def test_tied_embeddings_stay_tied():
    model = tiny_model("llama", head="causal-lm", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    liar.prune(model, tiny_batches(model), keep=0.5, progress=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_uncovered_layers_are_named(registry):
    liar.register(replace(BERT, patterns=BERT.patterns[:1]))
    layout = layout_of(tiny_model("bert"))
    assert layout.uncovered == tuple(f"encoder.layer.{i}.{name}.dense" for i in range(2) for name in ("intermediate", "output"))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_sites_lead_to_layers(model_type):
    model = tiny_model(model_type)
    layout = layout_of(model)
    for site in layout.sites:
        block = model.get_submodule(site.block)
        assert layer_of(block, site.consumer).module is model.get_submodule(site.module)
        assert layout[site.name] is site
        assert site in layout.of_kind(site.kind)
        assert site in layout.of_block(site.block)
    assert layout.kept_parameters({site.name: site.units for site in layout.sites}) == layout.parameters


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_float_weights_are_welcome(dtype):
    assert layout_of(tiny_model("bert", dtype=dtype)) == layout_of(tiny_model("bert"))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_weights_are_not(dtype):
    model = tiny_model("bert")
    layer = model.encoder.layer[1].intermediate.dense
    layer.weight = nn.Parameter(layer.weight.to(dtype), requires_grad=False)
    with pytest.raises(ModelError, match=r"encoder\.layer\.1\.intermediate\.dense is a Linear, expected .*quantise"):
        layout_of(model)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_sizes_that_layers_note_are_checked(model_type, monkeypatch):
    """The models run without them, but other programs read them."""
    select = LayerView.select

    def forgetful(self, axis, channels):
        attribute = self.storage.sizes[axis]
        noted = getattr(self.module, attribute)
        select(self, axis, channels)
        setattr(self.module, attribute, noted)

    monkeypatch.setattr(LayerView, "select", forgetful)
    with pytest.raises(AssertionError, match="noted sizes"):
        check_family(tiny_model(model_type))
