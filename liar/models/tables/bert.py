"""BERT: post-norm encoder, biases everywhere; `attention.output` and `output` add the residual themselves."""

from liar.models.family import Family, SitePattern

BERT = Family(
    model_type="bert",
    blocks="encoder.layer",
    is_pre_norm=False,
    patterns=(
        SitePattern(
            kind="heads",
            producers=("attention.self.query", "attention.self.key", "attention.self.value"),
            consumer="attention.output.dense",
            residual=("attention.output", 1),
            sublayer="attention.self",
            unit_width="attention.self.attention_head_size",
            size_attributes=("attention.self.num_attention_heads", "attention.self.all_head_size"),
            config_keys=("num_attention_heads",),
        ),
        SitePattern(
            kind="neurons",
            producers=("intermediate.dense",),
            consumer="output.dense",
            residual=("output", 1),
            sublayer="intermediate",
            config_keys=("intermediate_size",),
        ),
    ),
    note="any head class; a unit of attention is a head",
)
FAMILIES = (BERT,)
