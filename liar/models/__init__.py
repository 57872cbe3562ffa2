"""What the library knows about models: one table per family, the layout of a model's sites, and one view of every layer."""

from liar.models.family import Family, FusedProducer, SitePattern
from liar.models.layers import Axis, LayerView, is_plain
from liar.models.layout import Edge, Layout, Segment, Site, layer_of
from liar.models.ownership import check_default_device, check_model, why_unusable
from liar.models.registry import (
    base_and_prefix,
    discover,
    discover_with_weights,
    families,
    family_of,
    layout_of,
    register,
    registered,
    takes_choices,
)

__all__ = [
    "Axis",
    "Edge",
    "Family",
    "FusedProducer",
    "LayerView",
    "Layout",
    "Segment",
    "Site",
    "SitePattern",
    "base_and_prefix",
    "check_default_device",
    "check_model",
    "discover",
    "discover_with_weights",
    "families",
    "family_of",
    "is_plain",
    "layer_of",
    "layout_of",
    "register",
    "registered",
    "takes_choices",
    "why_unusable",
]
