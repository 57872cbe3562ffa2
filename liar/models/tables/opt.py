"""OPT: pre-norm decoder, but for its version with 350 million parameters; the feed-forward part reads tokens by themselves."""

from dataclasses import replace

from liar.models.family import Family, SitePattern

HEADS = SitePattern(
    kind="heads",
    producers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    consumer="self_attn.out_proj",
    residual=("self_attn_layer_norm", 0),
    sublayer="self_attn",
    unit_width="self_attn.head_dim",
    size_attributes=("self_attn.num_heads", "self_attn.embed_dim"),
    config_keys=("num_attention_heads",),
)
NEURONS = SitePattern("neurons", ("fc1",), "fc2", residual=("final_layer_norm", 0), config_keys=("ffn_dim",))
POST_NORM = Family(
    model_type="opt",
    blocks="decoder.layers",
    is_pre_norm=False,
    requires=(("do_layer_norm_before", False),),
    patterns=(replace(HEADS, residual=("self_attn.q_proj", 0)), replace(NEURONS, residual=("fc1", 0))),
    note="a unit of attention is a head; stock classes cannot load fewer heads",
)
OPT = replace(
    POST_NORM,
    is_pre_norm=True,
    requires=(("do_layer_norm_before", True),),
    patterns=(HEADS, NEURONS),
    otherwise=POST_NORM,
)
FAMILIES = (OPT,)
