"""What the library knows about models: one table per family, the layout of a model's sites, and one view of every layer."""

from liar.models.dispatched import check_kept_here, compute_device, is_dispatched, is_offloaded, take_weights_away
from liar.models.family import Family, FusedProducer, SitePattern, Stack
from liar.models.layers import Axis, LayerView, is_plain, linear_layers
from liar.models.layout import Edge, HeadArgument, Layout, Segment, Site, check_one_stack, layer_of
from liar.models.ownership import check_default_device, check_model, count_parameters, why_unusable
from liar.models.plain import (
    compute_on,
    copy_without_hooks,
    forget_unused,
    on_device,
    plain_block,
    put_away,
    set_parameters,
    shared_by_copies,
)
from liar.models.registry import families, family_for, family_of, is_registered, model_type_of, register, registered
from liar.models.sites import base_and_prefix, layout_of, layout_with_weights, stacks_of, takes_choices
from liar.models.stored import check_weights, stored_items, stored_state
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
    "Stack",
    "base_and_prefix",
    "check_default_device",
    "check_kept_here",
    "check_model",
    "check_one_stack",
    "check_weights",
    "compute_device",
    "compute_on",
    "copy_without_hooks",
    "count_parameters",
    "families",
    "family_for",
    "family_of",
    "forget_unused",
    "is_dispatched",
    "is_offloaded",
    "is_plain",
    "is_registered",
    "layer_of",
    "layout_of",
    "layout_with_weights",
    "linear_layers",
    "model_type_of",
    "on_device",
    "plain_block",
    "put_away",
    "register",
    "registered",
    "set_parameters",
    "shared_by_copies",
    "stacks_of",
    "stored_items",
    "stored_state",
    "take_weights_away",
    "takes_choices",
    "transformer_in",
    "why_unusable",
]
