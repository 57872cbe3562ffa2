"""GPT-J and Phi: attention and feed-forward part read one norm of the residual stream, and are added to it together."""

from dataclasses import replace

from liar.models.family import Family, SitePattern
from liar.models.tables.llama import HEADS

GPTJ = Family(
    model_type="gptj",
    blocks="h",
    is_pre_norm=True,
    is_parallel=True,
    patterns=(
        SitePattern(
            kind="heads",
            producers=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
            consumer="attn.out_proj",
            residual=("ln_1", 0),
            sublayer="attn",
            unit_width="attn.head_dim",
            size_attributes=("attn.num_attention_heads", "attn.embed_dim"),
            config_keys=("n_head",),
        ),
        SitePattern("neurons", ("mlp.fc_in",), "mlp.fc_out", residual=("ln_1", 0), sublayer="mlp", config_keys=("n_inner",)),
    ),
    note="a unit of attention is a head; stock classes cannot load fewer heads",
)
PHI = Family(
    model_type="phi",
    blocks="layers",
    is_pre_norm=True,
    is_parallel=True,
    requires=(("qk_layernorm", False),),
    patterns=(
        replace(HEADS, consumer="self_attn.dense"),
        SitePattern(
            "neurons",
            ("mlp.fc1",),
            "mlp.fc2",
            residual=("input_layernorm", 0),
            sublayer="mlp",
            config_keys=("intermediate_size",),
        ),
    ),
    note="grouped-query attention; a unit of attention is a key/value head with its query heads",
)
FAMILIES = (GPTJ, PHI)
