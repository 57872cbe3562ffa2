"""DistilBERT: post-norm encoder; the block itself adds the residual, which the first layers of each part read."""

from liar.models.family import Family, SitePattern

DISTILBERT = Family(
    model_type="distilbert",
    blocks="transformer.layer",
    is_pre_norm=False,
    patterns=(
        SitePattern(
            kind="heads",
            producers=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
            consumer="attention.out_lin",
            residual=("attention.q_lin", 0),
            unit_width="attention.attention_head_size",
            size_attributes=("attention.n_heads", "attention.dim"),
            config_keys=("n_heads",),
        ),
        SitePattern("neurons", ("ffn.lin1",), "ffn.lin2", residual=("ffn.lin1", 0), config_keys=("hidden_dim",)),
    ),
    note="a unit of attention is a head",
)
FAMILIES = (DISTILBERT,)
