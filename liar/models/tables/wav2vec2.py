"""Wav2Vec2 and HuBERT: post-norm encoders of sound."""

from dataclasses import replace

from liar.models.family import Family, SitePattern

WAV2VEC2 = Family(
    model_type="wav2vec2",
    blocks="encoder.layers",
    is_pre_norm=False,
    requires=(("do_stable_layer_norm", False),),
    patterns=(
        SitePattern(
            kind="heads",
            producers=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
            consumer="attention.out_proj",
            residual=("attention.q_proj", 0),
            sublayer="attention",
            unit_width="attention.head_dim",
            size_attributes=("attention.num_heads", "attention.embed_dim"),
            config_keys=("num_attention_heads",),
        ),
        SitePattern(
            kind="neurons",
            producers=("feed_forward.intermediate_dense",),
            consumer="feed_forward.output_dense",
            residual=("feed_forward", 0),
            sublayer="feed_forward",
            config_keys=("intermediate_size",),
        ),
    ),
    note="a unit of attention is a head; stock classes cannot load fewer heads",
)
FAMILIES = (WAV2VEC2, replace(WAV2VEC2, model_type="hubert"))
