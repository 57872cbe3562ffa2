"""BART and the other models of texts or sound with its modules: an encoder, and a decoder with attention to what it gives."""

from dataclasses import replace

from liar.models.family import Family, SitePattern, Stack

# Post-norm: the layers read the residual stream themselves. In the decoder, the feed-forward part comes after its attention to
# the encoder, which stays whole.
HEADS = SitePattern(
    kind="heads",
    producers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    consumer="self_attn.out_proj",
    residual=("self_attn.q_proj", 0),
    sublayer="self_attn",
    unit_width="self_attn.head_dim",
    size_attributes=("self_attn.num_heads", "self_attn.embed_dim"),
    config_keys=("encoder_attention_heads",),
)
NEURONS = SitePattern("neurons", ("fc1",), "fc2", residual=("fc1", 0), config_keys=("encoder_ffn_dim",))
DECODER_KEYS = {"heads": ("decoder_attention_heads",), "neurons": ("decoder_ffn_dim",)}


def _with_decoder(encoder: Family) -> Family:
    """A family whose decoder has the modules of its encoder by the same names."""
    patterns = tuple(replace(pattern, config_keys=DECODER_KEYS[pattern.kind]) for pattern in encoder.patterns)
    return replace(encoder, decoder=Stack("decoder.layers", patterns))


BART = _with_decoder(
    Family(
        model_type="bart",
        blocks="encoder.layers",
        is_pre_norm=False,
        patterns=(HEADS, NEURONS),
        note="encoder and decoder; a unit of attention is a head; attention between the two is not cut",
    )
)
# Pre-norm.
PEGASUS = _with_decoder(
    replace(
        BART,
        model_type="pegasus",
        is_pre_norm=True,
        patterns=(
            replace(HEADS, residual=("self_attn_layer_norm", 0)),
            replace(NEURONS, residual=("final_layer_norm", 0)),
        ),
    )
)
FAMILIES = (
    *(replace(BART, model_type=name) for name in ("bart", "blenderbot-small", "marian")),
    *(replace(PEGASUS, model_type=name) for name in ("blenderbot", "mbart", "pegasus", "whisper")),
)
