"""ViT, DeiT and DINOv2: pre-norm encoders of images."""

from dataclasses import replace

from liar.models.family import Family, SitePattern

VIT = Family(
    model_type="vit",
    blocks="layers",
    is_pre_norm=True,
    patterns=(
        SitePattern(
            kind="heads",
            producers=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
            consumer="attention.o_proj",
            residual=("layernorm_before", 0),
            sublayer="attention",
            unit_width="attention.head_dim",
            size_attributes=("attention.num_attention_heads",),
            config_keys=("num_attention_heads",),
        ),
        SitePattern(
            "neurons",
            ("mlp.fc1",),
            "mlp.fc2",
            residual=("layernorm_after", 0),
            sublayer="mlp",
            config_keys=("intermediate_size",),
        ),
    ),
    note="a unit of attention is a head; stock classes cannot load fewer heads",
)
DINOV2 = replace(
    VIT,
    model_type="dinov2",
    blocks="encoder.layer",
    patterns=(
        replace(VIT.patterns[0], residual=("norm1", 0), output_scale="layer_scale1.lambda1"),
        replace(VIT.patterns[1], residual=("norm2", 0), output_scale="layer_scale2.lambda1", config_keys=()),
    ),
)
FAMILIES = (VIT, replace(VIT, model_type="deit"), DINOV2)
