"""T5 and mT5: pre-norm encoder and decoder; their first blocks make a bias by position for the heads of all blocks."""

from dataclasses import replace

from liar.models.family import Family, SitePattern, Stack
from liar.models.layout import HeadArgument

HEADS = SitePattern(
    kind="heads",
    producers=("layer.0.SelfAttention.q", "layer.0.SelfAttention.k", "layer.0.SelfAttention.v"),
    consumer="layer.0.SelfAttention.o",
    residual=("layer.0.layer_norm", 0),
    sublayer="layer.0.SelfAttention",
    unit_width="layer.0.SelfAttention.key_value_proj_dim",
    size_attributes=("layer.0.SelfAttention.n_heads", "layer.0.SelfAttention.inner_dim"),
    head_argument=HeadArgument(
        "layer.0.SelfAttention", "position_bias", position=3, dim=1, returned=1, maker="relative_attention_bias"
    ),
    config_keys=("num_heads",),
)


def _neurons(layer: str, *producers: str) -> SitePattern:
    """The feed-forward part, which is in the last layer of a block."""
    part = f"{layer}.DenseReluDense"
    return SitePattern(
        kind="neurons",
        producers=tuple(f"{part}.{name}" for name in producers),
        consumer=f"{part}.wo",
        residual=(f"{layer}.layer_norm", 0),
        sublayer=part,
        config_keys=("d_ff",),
    )


GATED = Family(
    model_type="t5",
    blocks="encoder.block",
    is_pre_norm=True,
    requires=(("is_gated_act", True),),
    patterns=(HEADS, _neurons("layer.1", "wi_0", "wi_1")),
    decoder=Stack("decoder.block", (HEADS, _neurons("layer.2", "wi_0", "wi_1"))),
    note="encoder and decoder; a unit of attention is a head; attention between the two is not cut",
)
T5 = replace(
    GATED,
    requires=(("is_gated_act", False),),
    patterns=(HEADS, _neurons("layer.1", "wi")),
    decoder=Stack("decoder.block", (HEADS, _neurons("layer.2", "wi"))),
    otherwise=GATED,
)
FAMILIES = (T5, replace(T5, model_type="mt5", otherwise=replace(GATED, model_type="mt5")))
