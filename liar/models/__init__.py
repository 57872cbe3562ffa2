"""What the library knows about models: one table per family, the layout of a model's sites, and one view of every layer."""

from liar.models.family import Family, FusedProducer, SitePattern
from liar.models.layers import Axis, LayerView, is_plain, linear_layers
from liar.models.layout import Edge, HeadArgument, Layout, Segment, Site, count_parameters, layer_of
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
from liar.models.wrapped import transformer_in

__all__ = [
    "Axis",
    "Edge",
    "Family",
    "FusedProducer",
    "HeadArgument",
    "LayerView",
    "Layout",
    "Segment",
    "Site",
    "SitePattern",
    "base_and_prefix",
    "check_default_device",
    "check_model",
    "count_parameters",
    "discover",
    "discover_with_weights",
    "families",
    "family_of",
    "is_plain",
    "layer_of",
    "layout_of",
    "linear_layers",
    "register",
    "registered",
    "takes_choices",
    "transformer_in",
    "why_unusable",
]
