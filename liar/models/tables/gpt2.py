"""GPT-2: pre-norm decoder; transposed layers (`Conv1D`), and one layer computes query, key and value."""

from liar.models.family import Family, FusedProducer, SitePattern

GPT2 = Family(
    model_type="gpt2",
    blocks="h",
    is_pre_norm=True,
    patterns=(
        SitePattern(
            kind="heads",
            producers=(FusedProducer("attn.c_attn", 3),),
            consumer="attn.c_proj",
            residual=("ln_1", 0),
            sublayer="attn",
            unit_width="attn.head_dim",
            size_attributes=("attn.num_heads", "attn.split_size"),
            config_keys=("n_head",),
        ),
        SitePattern("neurons", ("mlp.c_fc",), "mlp.c_proj", residual=("ln_2", 0), sublayer="mlp", config_keys=("n_inner",)),
    ),
    note="a unit of attention is a head; stock classes cannot load fewer heads",
)
FAMILIES = (GPT2,)
