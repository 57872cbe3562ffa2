"""BERT and the encoders with its modules: post-norm, biases everywhere; the output modules add the residual themselves."""

from dataclasses import replace

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
# The same modules by the same names.
NAMESAKES = (
    "bert-generation",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "layoutlm",
    "roberta",
    "roc_bert",
    "xlm-roberta",
)
DEBERTA = replace(
    BERT,
    model_type="deberta-v2",
    requires=(("conv_kernel_size", 0),),
    patterns=BERT.patterns[1:],
    note="neurons only: its query and key layers read the relative positions as well",
)
FAMILIES = (BERT, *(replace(BERT, model_type=name) for name in NAMESAKES), DEBERTA)
