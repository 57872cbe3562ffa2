"""OPT: pre-norm decoder, but for its version with 350 million parameters."""

from liar.models.family import Family, SitePattern

OPT = Family(
    model_type="opt",
    blocks="decoder.layers",
    is_pre_norm=True,
    requires=(("do_layer_norm_before", True),),
    patterns=(
        SitePattern(
            kind="heads",
            producers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            consumer="self_attn.out_proj",
            residual=("self_attn_layer_norm", 0),
            sublayer="self_attn",
            unit_width="self_attn.head_dim",
            size_attributes=("self_attn.num_heads", "self_attn.embed_dim"),
            config_keys=("num_attention_heads",),
        ),
    ),
    note="heads only: its feed-forward part reads tokens without their sequences",
)
FAMILIES = (OPT,)
