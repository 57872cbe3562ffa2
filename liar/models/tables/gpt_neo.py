"""GPT-Neo: GPT-2 with separate projections and plain linear layers."""

from liar.models.family import Family, SitePattern

GPT_NEO = Family(
    model_type="gpt_neo",
    blocks="h",
    is_pre_norm=True,
    patterns=(
        SitePattern(
            kind="heads",
            producers=("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
            consumer="attn.attention.out_proj",
            residual=("ln_1", 0),
            sublayer="attn",
            unit_width="attn.attention.head_dim",
            size_attributes=("attn.attention.num_heads", "attn.attention.embed_dim"),
            config_keys=("num_heads",),
        ),
        SitePattern(
            "neurons", ("mlp.c_fc",), "mlp.c_proj", residual=("ln_2", 0), sublayer="mlp", config_keys=("intermediate_size",)
        ),
    ),
    note="a unit of attention is a head; stock classes cannot load fewer heads",
)
FAMILIES = (GPT_NEO,)
