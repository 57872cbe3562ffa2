"""Tables found by tracing: equal to those written by hand, for unknown classes too, or an error that says what is missing."""

import pprint
from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from typer.testing import CliRunner

import liar
from liar.cli import app
from liar.errors import ModelError
from liar.models import registered
from liar.models.tables.bert import BERT
from liar.models.tables.gpt2 import GPT2
from liar.models.tables.llama import LLAMA
from liar.testing import assert_same_state, model_state, randomise, tiny_batches, tiny_model
from liar.tracing.blocks import find_blocks
from liar.tracing.small import probe_of, small_model
from liar.tracing.streams import find_consumers
from liar.tracing.trace import trace_block
from liar.tracing.units import find_effects


@pytest.fixture(autouse=True)
def _no_families(registry):
    """Nothing is known; what is found is not registered."""
    registry.clear()


def proposed(model):
    return liar.propose_family(model, tiny_batches(model, batches=1)[0])


def like(table, model_type, is_parallel=False, *, heads=None, neurons=None):
    """A table that differs from another in some fields of its patterns."""
    patterns = (replace(table.patterns[0], **heads or {}), replace(table.patterns[1], **neurons or {}))
    return replace(table, model_type=model_type, is_parallel=is_parallel, patterns=patterns)


# Arguments of `tiny_model`, and the table as one would write it by hand.
TABLES = {
    "bert": ({}, BERT),
    "gpt2": ({"head": "causal-lm"}, GPT2),
    "llama": ({"head": "causal-lm"}, LLAMA),
    "roberta": ({"head": "masked-lm", "max_position_embeddings": 70}, like(BERT, "roberta")),
    "electra": ({}, like(BERT, "electra")),
    # The model itself shares no keys and values, or has only one: its class can.
    "qwen2": ({"num_key_value_heads": 4}, like(LLAMA, "qwen2")),
    "gemma": ({"num_key_value_heads": 1, "head_dim": 8}, like(LLAMA, "gemma")),
    "distilbert": (
        {"hidden_dim": 64},
        like(
            replace(BERT, blocks="transformer.layer"),
            "distilbert",
            heads={
                "producers": ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
                "consumer": "attention.out_lin",
                "residual": ("attention", 0),
                "sublayer": "attention",
                "unit_width": "attention.attention_head_size",
                "size_attributes": ("attention.n_heads",),
                "config_keys": ("n_heads",),
            },
            neurons={
                "producers": ("ffn.lin1",),
                "consumer": "ffn.lin2",
                "residual": ("ffn", 0),
                "sublayer": "ffn",
                "config_keys": ("hidden_dim",),
            },
        ),
    ),
    "gptj": (
        {"attention": "eager", "rotary_dim": 4},
        like(
            GPT2,
            "gptj",
            is_parallel=True,
            heads={
                "producers": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
                "consumer": "attn.out_proj",
                "size_attributes": ("attn.num_attention_heads",),
            },
            neurons={"producers": ("mlp.fc_in",), "consumer": "mlp.fc_out", "residual": ("ln_1", 0)},
        ),
    ),
    "gpt_neo": (
        {"attention": "eager", "attention_types": [[["global", "local"], 1]], "window_size": 4},
        like(
            GPT2,
            "gpt_neo",
            heads={
                "producers": ("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
                "consumer": "attn.attention.out_proj",
                "sublayer": "attn.attention",
                "unit_width": "attn.attention.head_dim",
                "size_attributes": ("attn.attention.num_heads",),
                "config_keys": ("num_heads",),
            },
            neurons={"config_keys": ("intermediate_size",)},
        ),
    ),
    "starcoder2": (
        {"num_key_value_heads": 2},
        like(LLAMA, "starcoder2", neurons={"producers": ("mlp.c_fc",), "consumer": "mlp.c_proj", "size_attributes": ()}),
    ),
    "phi": (
        {},
        like(
            LLAMA,
            "phi",
            is_parallel=True,
            heads={"consumer": "self_attn.dense"},
            neurons={
                "producers": ("mlp.fc1",),
                "consumer": "mlp.fc2",
                "residual": ("input_layernorm", 0),
                "size_attributes": (),
            },
        ),
    ),
    "gpt_neox": (
        {},
        like(
            LLAMA,
            "gpt_neox",
            is_parallel=True,
            heads={
                "producers": ("attention.query_key_value",),
                "consumer": "attention.dense",
                "sublayer": "attention",
                "unit_width": "attention.head_size",
                "group_size": None,
                "config_keys": ("num_attention_heads",),
            },
            neurons={
                "producers": ("mlp.dense_h_to_4h",),
                "consumer": "mlp.dense_4h_to_h",
                "residual": ("input_layernorm", 0),
                "size_attributes": (),
            },
        ),
    ),
}


@pytest.mark.parametrize("model_type", TABLES)
def test_the_table_is_the_one_written_by_hand(model_type, registry):
    arguments, table = TABLES[model_type]
    model = tiny_model(model_type, **arguments)
    model.train()
    before = model_state(model)
    family = proposed(model)
    assert replace(family, note=table.note) == table
    assert type(model).__name__ in family.note
    assert registry == {}
    assert_same_state(model, before)


class HouseConfig(PreTrainedConfig):
    model_type = "house"

    def __init__(
        self, words=96, channels=24, stages=2, heads=4, key_heads=2, inner=40, rank=0, scale=1.0, crossed=False, **kwargs
    ):
        self.words, self.channels, self.stages, self.inner, self.rank = words, channels, stages, inner, rank
        self.heads, self.key_heads, self.scale, self.crossed = heads, key_heads, scale, crossed
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return self.words


class Mixer(nn.Module):
    """Attention with keys and values from one layer, each shared by several queries."""

    def __init__(self, config):
        super().__init__()
        self.per_head = config.channels // 4
        self.queries_per_key = config.heads // config.key_heads
        self.narrow = nn.Linear(config.channels, config.rank) if config.rank else nn.Identity()
        self.ask = nn.Linear(config.rank or config.channels, config.heads * self.per_head)
        self.answer = nn.Linear(config.rank or config.channels, 2 * config.key_heads * self.per_head)
        self.merge = nn.Linear(config.heads * self.per_head, config.channels)

    def forward(self, states, mask):
        states = self.narrow(states)
        queries = self.ask(states).unflatten(-1, (-1, self.per_head)).transpose(1, 2)
        keys, values = (
            part.unflatten(-1, (-1, self.per_head)).transpose(1, 2).repeat_interleave(self.queries_per_key, 1)
            for part in self.answer(states).chunk(2, -1)
        )
        mixed = nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return self.merge(mixed.transpose(1, 2).flatten(2))


class Stage(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.scale, self.crossed = config.scale, config.crossed
        self.before_mixing, self.before_growing = nn.LayerNorm(config.channels), nn.LayerNorm(config.channels)
        self.mixer = Mixer(config)
        self.grow, self.gate = nn.Linear(config.channels, config.inner), nn.Linear(config.channels, config.inner)
        self.shrink = nn.Linear(config.inner, config.channels)

    def forward(self, states, mask):
        mixed = self.mixer(self.before_mixing(states), mask)
        states = states + (mixed if self.scale == 1 else mixed * self.scale)
        grown = self.before_growing(states)
        states = states + self.shrink(nn.functional.silu(self.gate(grown)) * self.grow(grown))
        return states + mixed.square() if self.crossed else states


class House(PreTrainedModel):
    """A transformer of nobody's, with names of its own."""

    config_class = HouseConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.words, config.channels)
        self.stages = nn.ModuleList(Stage(config) for _ in range(config.stages))
        self.last = nn.LayerNorm(config.channels)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        states = self.words(input_ids)
        mask = None if attention_mask is None else attention_mask[:, None, None].bool()
        for stage in self.stages:
            states = stage(states, mask)
        return BaseModelOutput(last_hidden_state=self.last(states))


def house(**entries):
    model = House(HouseConfig(**entries)).eval()
    randomise(model)
    return model


HOUSE = liar.Family(
    model_type="house",
    blocks="stages",
    is_pre_norm=True,
    patterns=(
        liar.SitePattern(
            kind="heads",
            producers=("mixer.ask", liar.FusedProducer("mixer.answer", 2)),
            consumer="mixer.merge",
            residual=("before_mixing", 0),
            sublayer="mixer",
            unit_width="mixer.per_head",
            group_size="mixer.queries_per_key",
            config_keys=("heads", "key_heads"),
        ),
        liar.SitePattern(
            kind="neurons",
            producers=("gate", "grow"),
            consumer="shrink",
            residual=("before_growing", 0),
            config_keys=("inner",),
        ),
    ),
    note="proposed from House",
)


def test_the_table_of_a_class_that_nobody_knows():
    assert proposed(house()) == HOUSE


def test_a_layer_that_reaches_all_heads_through_another_is_not_cut():
    model = house(rank=5)
    assert proposed(model) == HOUSE
    assert liar.discover(model, tiny_batches(model)[0]).uncovered == ("stages.0.mixer.narrow", "stages.1.mixer.narrow")


def test_a_class_that_nobody_knows_is_discovered_and_pruned(registry):
    model = house(stages=3)
    batch = tiny_batches(model)[0]
    with pytest.raises(ModelError, match="known family"):
        liar.discover(model)
    layout = liar.discover(model, batch)
    assert [(site.name, site.units, site.query_heads) for site in layout.sites[:2]] == [("heads.0", 2, 2), ("neurons.0", 40, 1)]
    assert len(layout.blocks) == 3
    assert registry == {}
    liar.register(HOUSE)
    assert liar.discover(model) == layout
    liar.prune(model, tiny_batches(model), keep=0.6, progress=False)
    assert liar.discover(model).parameters < layout.parameters


def test_a_known_family_is_not_traced(registry):
    model = tiny_model("bert")
    registry["bert"] = replace(BERT, patterns=BERT.patterns[:1])
    assert [site.name for site in liar.discover(model, {"no": "batch"}).sites] == ["heads.0", "heads.1"]


def test_what_is_registered_stays_registered(registry):
    registry["bert"] = wrong = replace(BERT, blocks="wrong")
    assert proposed(tiny_model("bert")).blocks == "encoder.layer"
    assert registry == {"bert": wrong}


def test_a_trace_stays_as_it_was_where_a_block_adds_in_place():
    """Falcon adds the output of its attention to that of its feed-forward part, in place."""
    probe = probe_of(tiny_model("falcon", attention="eager"), "h")
    trace, again = trace_block(probe), trace_block(probe)
    find_effects(probe, trace, find_consumers(trace))
    assert list(trace.outputs) == list(again.outputs)
    assert all(torch.equal(trace.outputs[name], again.outputs[name]) for name in trace.outputs)


def test_a_large_model_is_tried_with_fewer_layers_and_words():
    model = tiny_model("qwen2", num_hidden_layers=5, num_key_value_heads=4, vocab_size=2000, max_window_layers=5)
    assert len(model.config.layer_types) == 5
    small = small_model(model, find_blocks(model, tiny_batches(model)[0]))
    assert (len(small.layers), small.embed_tokens.num_embeddings, small.layers[0].self_attn.num_key_value_groups) == (2, 512, 2)
    assert len(small_model(house(stages=4), "stages").stages) == 2


def test_the_table_can_be_pasted():
    names = {}
    exec(f"from liar import *\nfamily = {pprint.pformat(HOUSE)}", names)
    assert names["family"] == HOUSE


@pytest.mark.parametrize("change", [{"scale": 0.3}, {"crossed": True}])
def test_blocks_that_differ_further_down_are_refused(change):
    """The contract runs on two blocks; the model itself says whether the table holds for the others."""
    model, other = house(stages=4), house(stages=4, **change)
    for stage, changed in zip(model.stages[2:], other.stages[2:], strict=True):
        stage.scale, stage.crossed = changed.scale, changed.crossed
    with pytest.raises(ModelError, match=r"not found: .*(heads|neurons)\.2: what comes out of the block"):
        proposed(model)


def test_registrations_of_others_outlive_a_proposal(registry):
    with registered(replace(HOUSE, model_type="mine")):
        liar.register(replace(HOUSE, model_type="theirs"))
    assert "theirs" in registry
    assert "mine" not in registry


def test_the_command_line_prints_a_table(tmp_path, registry):
    tiny_model("mistral", head="causal-lm", num_key_value_heads=2).save_pretrained(tmp_path / "model")
    done = CliRunner().invoke(app, ["families", "--propose", str(tmp_path / "model")])
    names = {}
    exec(done.stdout, names)
    (family,) = names["FAMILIES"]
    assert replace(family, note=LLAMA.note) == like(LLAMA, "mistral")
    tiny_model("albert", embedding_size=16).save_pretrained(tmp_path / "albert")
    done = CliRunner().invoke(app, ["families", "--propose", str(tmp_path / "albert")])
    assert (done.exit_code, done.stdout) == (1, "")
    assert "blocks that layers share cannot be cut" in done.stderr


def with_pixels():
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    return transformers.ResNetModel(config).eval(), {"pixel_values": torch.zeros(1, 3, 32, 32)}


def with_text(model):
    return model, tiny_batches(model, batches=1)[0]


def two_stacks(model_type, **entries):
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    return with_text(tiny_model(model_type, **sizes, **heads, **entries))


# What no table describes -> what is said about it
REFUSED = {
    "shared blocks": (
        lambda: with_text(tiny_model("albert", embedding_size=16)),
        r"not found: blocks: .*encoder.albert_layer_groups: 1 modules are called 2 times in one pass; blocks that layers share",
    ),
    "images": (
        with_pixels,
        r"ResNetModel \(model_type 'resnet'\)\n- not found: blocks: .*expected a batch with input_ids",
    ),
    "two stacks": (
        lambda: two_stacks("bart"),
        r"not found: blocks: .*several stacks of blocks: encoder.layers, decoder.layers",
    ),
    "experts": (
        lambda: with_text(tiny_model("mixtral", num_key_value_heads=2, num_local_experts=2)),
        r"not found: consumers: .*there are 1 \(self_attn.o_proj\); weights outside of linear layers: .*experts.down_proj"
        r"[\s\S]*found: blocks='layers'\n- found: heads: from self_attn.q_proj, self_attn.k_proj, self_attn.v_proj to",
    ),
    "a norm before the sum": (
        lambda: with_text(tiny_model("gemma2", attention="eager", num_key_value_heads=2, head_dim=8)),
        r"not found: consumers: .*there are 0 .*output of self_attn.o_proj goes to post_attention_layernorm \(Gemma2RMSNorm\)",
    ),
    "a scale before the sum": (
        lambda: with_text(house(scale=0.5)),
        r"not found: consumers: .*there are 1 \(shrink\); the output of mixer.merge is multiplied by something",
    ),
    "no attention": (
        lambda: with_text(tiny_model("mamba", attention="eager", state_size=4, time_step_rank=4)),
        r"not found: consumers: .*there are 1 \(mixer.out_proj\); weights outside .*mixer.conv1d.weight"
        r"[\s\S]*not found: units of mixer.out_proj: .*64 of 64 together.*mixer.in_proj reaches it through mixer.x_proj",
    ),
    "flat tokens": (
        lambda: with_text(tiny_model("opt", ffn_dim=64, word_embed_proj_dim=32)),
        r"not found: consumer fc2: it gives a tensor \[192, 32\], expected \[sequences, length, channels\]"
        r"[\s\S]*found: neurons: from fc1 to fc2",
    ),
    "unequal parts": (
        lambda: with_text(tiny_model("phi3", num_key_value_heads=2)),
        r"not found: producers of self_attn.o_proj: the 64 output channels of self_attn.qkv_proj are not 2 units in equal parts"
        r"[\s\S]*found: neurons: from FusedProducer\(module='mlp.gate_up_proj', parts=2\) to mlp.down_proj",
    ),
    "biases of heads": (
        lambda: with_text(tiny_model("bloom", attention="eager")),
        r"not found: unit_width, group_size or size_attributes of self_attention.dense: .*it stops \(The expanded size",
    ),
    "blocks that differ": (
        lambda: with_text(tiny_model("modernbert")),
        r"not found: blocks: .*layers: its modules are not alike: not all have attn_norm \(Identity\), attn_norm \(LayerNorm\)",
    ),
    "an output that is used twice": (
        lambda: with_text(house(crossed=True)),
        r"not found: a table that passes liar.testing.check_family: heads.0: what comes out of the block is not a function of",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_table_describes_is_refused_field_by_field(name, registry):
    build, message = REFUSED[name]
    model, batch = build()
    before = model_state(model)
    with pytest.raises(ModelError, match=message) as caught:
        liar.discover(model, batch)
    assert str(caught.value).startswith(f"no table was found for {type(model).__name__} (model_type ")
    assert registry == {}
    assert_same_state(model, before)


def test_what_cannot_be_traced_says_why():
    model = tiny_model("bert")
    batch = tiny_batches(model)[0]
    with pytest.raises(ModelError, match=r"not found: model_type: the model has no config"):
        liar.propose_family(nn.Linear(2, 2), batch)
    with pytest.raises(ModelError, match=r"not found: blocks: the model does not run on the batch: .*from 0 to 96 - 1"):
        liar.propose_family(model, {"input_ids": torch.full((1, 4), 96)})
    with pytest.raises(ModelError, match=r"not found: blocks: the model is on the meta device"):
        liar.propose_family(model.to("meta"), batch)
