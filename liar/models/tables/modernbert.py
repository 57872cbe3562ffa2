"""ModernBERT: pre-norm encoder; query, key and value in one layer, gate and input of the feed-forward part in another."""

from liar.models.family import Family, FusedProducer, SitePattern

MODERNBERT = Family(
    model_type="modernbert",
    blocks="layers",
    is_pre_norm=True,
    patterns=(
        SitePattern(
            kind="heads",
            producers=(FusedProducer("attn.Wqkv", 3),),
            consumer="attn.Wo",
            residual=("attn_norm", 0),
            sublayer="attn",
            unit_width="attn.head_dim",
            config_keys=("num_attention_heads",),
        ),
        SitePattern(
            kind="neurons",
            producers=(FusedProducer("mlp.Wi", 2),),
            consumer="mlp.Wo",
            residual=("mlp_norm", 0),
            sublayer="mlp",
            config_keys=("intermediate_size",),
        ),
    ),
    note="a unit of attention is a head; stock classes cannot load fewer heads",
)
FAMILIES = (MODERNBERT,)
