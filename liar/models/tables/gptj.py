"""GPT-J and Phi: attention and feed-forward part read one norm of the residual stream, and are added to it together."""

from liar.models.family import Family, SitePattern

GPTJ = Family(
    model_type="gptj",
    blocks="h",
    is_pre_norm=True,
    is_parallel=True,
    patterns=(
        SitePattern(
            kind="heads",
            producers=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
            consumer="attn.out_proj",
            residual=("ln_1", 0),
            sublayer="attn",
            unit_width="attn.head_dim",
            size_attributes=("attn.num_attention_heads", "attn.embed_dim"),
            config_keys=("n_head",),
        ),
        SitePattern("neurons", ("mlp.fc_in",), "mlp.fc_out", residual=("ln_1", 0), sublayer="mlp", config_keys=("n_inner",)),
    ),
    note="a unit of attention is a head; stock classes cannot load fewer heads",
)
PHI = Family(
    model_type="phi",
    blocks="layers",
    is_pre_norm=True,
    is_parallel=True,
    requires=(("qk_layernorm", False),),
    patterns=(
        SitePattern(
            kind="heads",
            producers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            consumer="self_attn.dense",
            residual=("input_layernorm", 0),
            sublayer="self_attn",
            unit_width="self_attn.head_dim",
            group_size="self_attn.num_key_value_groups",
            config_keys=("num_attention_heads", "num_key_value_heads"),
        ),
        SitePattern(
            "neurons",
            ("mlp.fc1",),
            "mlp.fc2",
            residual=("input_layernorm", 0),
            sublayer="mlp",
            config_keys=("intermediate_size",),
        ),
    ),
    note="grouped-query attention; a unit of attention is a key/value head with its query heads",
)
FAMILIES = (GPTJ, PHI)
