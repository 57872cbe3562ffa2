"""LLaMA: pre-norm decoder, gated feed-forward, shared key and value heads; the norms read the residual stream.

A unit of attention is a whole group: one key/value head with its query heads. Every layer then keeps one ratio of query
to key heads, which is what the attention kernels and the stock configuration need, and the KV cache shrinks with it.
"""

from liar.models.family import Family, SitePattern

LLAMA = Family(
    model_type="llama",
    blocks="layers",
    is_pre_norm=True,
    patterns=(
        SitePattern(
            kind="heads",
            producers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            consumer="self_attn.o_proj",
            residual=("input_layernorm", 0),
            sublayer="self_attn",
            unit_width="self_attn.head_dim",
            group_size="self_attn.num_key_value_groups",
            config_keys=("num_attention_heads", "num_key_value_heads"),
        ),
        SitePattern(
            kind="neurons",
            producers=("mlp.gate_proj", "mlp.up_proj"),
            consumer="mlp.down_proj",
            residual=("post_attention_layernorm", 0),
            sublayer="mlp",
            size_attributes=("mlp.intermediate_size",),
            config_keys=("intermediate_size",),
        ),
    ),
    note="grouped-query attention; a unit of attention is a key/value head with its query heads",
)
FAMILIES = (LLAMA,)
