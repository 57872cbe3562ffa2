"""NomicBERT: post-norm encoder with a gated feed-forward part; the layers read the residual stream themselves."""

from liar.models.family import Family, SitePattern

NOMIC_BERT = Family(
    model_type="nomic_bert",
    blocks="layers",
    is_pre_norm=False,
    patterns=(
        SitePattern(
            kind="heads",
            producers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            consumer="self_attn.o_proj",
            residual=("self_attn.q_proj", 0),
            sublayer="self_attn",
            unit_width="self_attn.head_dim",
            config_keys=("num_attention_heads",),
        ),
        SitePattern(
            kind="neurons",
            producers=("mlp.gate_proj", "mlp.up_proj"),
            consumer="mlp.down_proj",
            residual=("mlp", 0),
            sublayer="mlp",
            size_attributes=("mlp.intermediate_size",),
            config_keys=("intermediate_size",),
        ),
    ),
    note="a unit of attention is a head; stock classes cannot load fewer heads",
)
FAMILIES = (NOMIC_BERT,)
