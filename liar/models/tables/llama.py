"""LLaMA and the models with its modules: pre-norm, gated feed-forward, shared key and value heads; norms read the residual.

A unit of attention is a whole group: one key/value head with its query heads. Every layer then keeps one ratio of query
to key heads, which is what the attention kernels and the stock configuration need, and the KV cache shrinks with it.
"""

from dataclasses import replace

from liar.models.family import Family, FusedProducer, SitePattern

LLAMA = Family(
    model_type="llama",
    blocks="layers",
    is_pre_norm=True,
    patterns=(
        SitePattern(
            kind="heads",
            producers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            consumer="self_attn.o_proj",
            residual=("input_layernorm", 0),
            sublayer="self_attn",
            unit_width="self_attn.head_dim",
            group_size="self_attn.num_key_value_groups",
            config_keys=("num_attention_heads", "num_key_value_heads"),
        ),
        SitePattern(
            kind="neurons",
            producers=("mlp.gate_proj", "mlp.up_proj"),
            consumer="mlp.down_proj",
            residual=("post_attention_layernorm", 0),
            sublayer="mlp",
            size_attributes=("mlp.intermediate_size",),
            config_keys=("intermediate_size",),
        ),
    ),
    note="grouped-query attention; a unit of attention is a key/value head with its query heads",
)
HEADS, NEURONS = LLAMA.patterns

# Attention that counts its own heads.
COUNTED_HEADS = replace(HEADS, size_attributes=("self_attn.num_heads", "self_attn.num_key_value_heads"))

# The same modules by the same names.
NAMESAKES = (
    "cwm",
    "ernie4_5",
    "eurobert",
    "gemma",
    "hunyuan_v1_dense",
    "ministral",
    "ministral3",
    "mistral",
    "olmo",
    "qwen2",
    "qwen3",
    "smollm3",
)
SEED_OSS = replace(
    LLAMA,
    model_type="seed_oss",
    patterns=(
        replace(HEADS, size_attributes=("self_attn.num_attention_heads", "self_attn.num_key_value_heads")),
        NEURONS,
    ),
)
STABLELM = replace(
    LLAMA,
    model_type="stablelm",
    requires=(("qk_layernorm", False), ("use_parallel_residual", False)),
    patterns=(COUNTED_HEADS, NEURONS),
)
GRANITE = replace(
    LLAMA,
    model_type="granite",
    patterns=tuple(replace(pattern, output_scale="residual_multiplier") for pattern in LLAMA.patterns),
)
COHERE = replace(
    LLAMA,
    model_type="cohere",
    is_parallel=True,
    patterns=(
        replace(HEADS, unit_parameters=("self_attn.q_norm.weight", "self_attn.k_norm.weight")),
        replace(NEURONS, residual=("input_layernorm", 0)),
    ),
)
COHERE2 = replace(
    LLAMA, model_type="cohere2", is_parallel=True, patterns=(HEADS, replace(NEURONS, residual=("input_layernorm", 0)))
)
# Without a gate.
PLAIN = replace(NEURONS, producers=("mlp.up_proj",))
ARCEE = replace(LLAMA, model_type="arcee", patterns=(HEADS, PLAIN))
NEMOTRON = replace(
    LLAMA,
    model_type="nemotron",
    patterns=(COUNTED_HEADS, PLAIN),
)
APERTUS = replace(
    LLAMA,
    model_type="apertus",
    patterns=(replace(HEADS, residual=("attention_layernorm", 0)), replace(PLAIN, residual=("feedforward_layernorm", 0))),
)
STARCODER2 = replace(
    LLAMA,
    model_type="starcoder2",
    patterns=(
        HEADS,
        replace(NEURONS, producers=("mlp.c_fc",), consumer="mlp.c_proj", size_attributes=()),
    ),
)
# Gate and up projection in one layer.
FUSED = replace(NEURONS, producers=(FusedProducer("mlp.gate_up_proj", 2),), size_attributes=())
GLM = replace(LLAMA, model_type="glm", patterns=(HEADS, FUSED))
PHI3 = replace(
    LLAMA,
    model_type="phi3",
    patterns=(FUSED,),
    note="neurons only: its attention takes the sizes of heads from the configuration",
)
# A norm between the layers' output and the residual stream.
GEMMA2 = replace(
    LLAMA,
    model_type="gemma2",
    patterns=(
        replace(HEADS, output_norm="post_attention_layernorm"),
        replace(NEURONS, residual=("pre_feedforward_layernorm", 0), output_norm="post_feedforward_layernorm"),
    ),
    note=f"{LLAMA.note}; a norm follows: layers are fitted to their own output",
)
GLM4 = replace(
    GEMMA2,
    model_type="glm4",
    patterns=(
        replace(HEADS, output_norm="post_self_attn_layernorm"),
        replace(FUSED, output_norm="post_mlp_layernorm"),
    ),
)
# No norm before the layers: these read the stream themselves.
EXAONE4 = replace(
    GEMMA2,
    model_type="exaone4",
    patterns=(
        replace(
            HEADS,
            residual=("self_attn.q_proj", 0),
            size_attributes=("self_attn.num_attention_heads", "self_attn.num_key_value_heads"),
            output_norm="post_attention_layernorm",
        ),
        replace(NEURONS, residual=("mlp", 0), output_norm="post_feedforward_layernorm"),
    ),
)
OLMO2 = replace(
    GEMMA2,
    model_type="olmo2",
    patterns=EXAONE4.patterns[1:],
    note="neurons only: its norm of queries and keys couples the heads; a norm follows: layers are fitted to their own output",
)
# Heads alone: the feed-forward part is made of experts.
EXPERTS = tuple(
    replace(LLAMA, model_type=name, patterns=(HEADS,), note=f"{LLAMA.note}; experts are not cut")
    for name in ("mixtral", "qwen2_moe", "qwen3_moe")
)
GPT_OSS = replace(EXPERTS[0], model_type="gpt_oss", patterns=(replace(HEADS, unit_parameters=("self_attn.sinks",)),))
FAMILIES = (
    LLAMA,
    *(replace(LLAMA, model_type=name) for name in NAMESAKES),
    APERTUS,
    ARCEE,
    COHERE,
    COHERE2,
    EXAONE4,
    GEMMA2,
    replace(GEMMA2, model_type="gemma3_text"),
    GLM,
    GLM4,
    GPT_OSS,
    GRANITE,
    NEMOTRON,
    OLMO2,
    replace(OLMO2, model_type="olmo3"),
    PHI3,
    SEED_OSS,
    STABLELM,
    STARCODER2,
    *EXPERTS,
)
