"""Wav2Vec2 and HuBERT: encoders of sound; the larger ones are pre-norm."""

from dataclasses import replace

from liar.models.family import Family, SitePattern

POST_NORM = Family(
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
HEADS, NEURONS = POST_NORM.patterns
PRE_NORM = replace(
    POST_NORM,
    is_pre_norm=True,
    # Without the adapters of its versions for many languages, which are added to the stream as well.
    requires=(("do_stable_layer_norm", True), ("adapter_attn_dim", None)),
    patterns=(replace(HEADS, residual=("layer_norm", 0)), replace(NEURONS, residual=("final_layer_norm", 0))),
)
FAMILIES = tuple(
    replace(POST_NORM, model_type=name, otherwise=replace(PRE_NORM, model_type=name)) for name in ("wav2vec2", "hubert")
)
