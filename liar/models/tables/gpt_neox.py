"""GPT-NeoX (Pythia) and BLOOM: one layer computes query, key and value, head by head."""

from liar.models.family import Family, SitePattern
from liar.models.layout import HeadArgument

GPT_NEOX = Family(
    model_type="gpt_neox",
    blocks="layers",
    is_pre_norm=True,
    is_parallel="use_parallel_residual",
    patterns=(
        SitePattern(
            kind="heads",
            producers=("attention.query_key_value",),
            consumer="attention.dense",
            residual=("input_layernorm", 0),
            sublayer="attention",
            unit_width="attention.head_size",
            config_keys=("num_attention_heads",),
        ),
        SitePattern(
            "neurons",
            ("mlp.dense_h_to_4h",),
            "mlp.dense_4h_to_h",
            residual=("post_attention_layernorm", 0),
            sublayer="mlp",
            config_keys=("intermediate_size",),
        ),
    ),
    note="a unit of attention is a head; stock classes cannot load fewer heads",
)
BLOOM = Family(
    model_type="bloom",
    blocks="h",
    is_pre_norm=True,
    requires=(("apply_residual_connection_post_layernorm", False), ("slow_but_exact", False)),
    patterns=(
        SitePattern(
            kind="heads",
            producers=("self_attention.query_key_value",),
            consumer="self_attention.dense",
            residual=("input_layernorm", 0),
            unit_width="self_attention.head_dim",
            size_attributes=("self_attention.num_heads", "self_attention.hidden_size", "self_attention.split_size"),
            config_keys=("n_head",),
            head_argument=HeadArgument("self_attention", "alibi", position=2, dim=0, with_sequences=True),
        ),
        SitePattern("neurons", ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", residual=("post_attention_layernorm", 0)),
    ),
    note="a unit of attention is a head; stock classes cannot load fewer heads or neurons",
)
FAMILIES = (GPT_NEOX, BLOOM)
