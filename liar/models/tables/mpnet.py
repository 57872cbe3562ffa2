"""MPNet: BERT whose encoder makes one bias by position for the heads of all layers."""

from liar.models.family import Family, SitePattern
from liar.models.layout import HeadArgument
from liar.models.tables.bert import BERT

MPNET = Family(
    model_type="mpnet",
    blocks="encoder.layer",
    is_pre_norm=False,
    patterns=(
        SitePattern(
            kind="heads",
            producers=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
            consumer="attention.attn.o",
            residual=("attention", 0),
            sublayer="attention.attn",
            unit_width="attention.attn.attention_head_size",
            size_attributes=("attention.attn.num_attention_heads", "attention.attn.all_head_size"),
            head_argument=HeadArgument("attention.attn", "position_bias", position=2, dim=1),
            config_keys=("num_attention_heads",),
        ),
        BERT.patterns[1],
    ),
    note="a unit of attention is a head; stock classes cannot load fewer heads",
)
FAMILIES = (MPNET,)
