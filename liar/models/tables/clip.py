"""The text and image encoders of CLIP and SigLIP, each by itself."""

from dataclasses import replace

from liar.models.family import Family, SitePattern

CLIP_TEXT = Family(
    model_type="clip_text_model",
    blocks="encoder.layers",
    is_pre_norm=True,
    patterns=(
        SitePattern(
            kind="heads",
            producers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            consumer="self_attn.out_proj",
            residual=("layer_norm1", 0),
            sublayer="self_attn",
            unit_width="self_attn.head_dim",
            size_attributes=("self_attn.num_heads", "self_attn.embed_dim"),
            config_keys=("num_attention_heads",),
        ),
        SitePattern(
            "neurons", ("mlp.fc1",), "mlp.fc2", residual=("layer_norm2", 0), sublayer="mlp", config_keys=("intermediate_size",)
        ),
    ),
    note="a unit of attention is a head; stock classes cannot load fewer heads",
)
FAMILIES = (
    CLIP_TEXT,
    *(replace(CLIP_TEXT, model_type=name) for name in ("clip_vision_model", "siglip_text_model", "siglip_vision_model")),
)
