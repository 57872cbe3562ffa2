"""Running a model block by block and reading its activations; the user's model is left as it was."""

from liar.runtime import distributed
from liar.runtime.blocks import (
    BlockCall,
    calls_of,
    recompute_blocks,
    record_block_calls,
    replace_forwards,
    run_block,
    run_model,
)
from liar.runtime.hooks import Point, StopForward, capture_activations, receive_activations, replay_output
from liar.runtime.identity import run_identity
from liar.runtime.journal import Journal, open_journal, remove_journal
from liar.runtime.outputs import Output, drawn, model_outputs, outputs_of
from liar.runtime.places import OnDisk, OnHost, map_tensors
from liar.runtime.state import exclusive, layout_when_free, preserve_model_state, record_gradients
from liar.runtime.store import ActivationStore
from liar.runtime.stream import added_point, by_sequence, output_scale, residual_points, residual_sum, sequence_sums, widen
from liar.runtime.workspace import IN_PLACE, Workspace, open_workspace

__all__ = [
    "IN_PLACE",
    "ActivationStore",
    "BlockCall",
    "Journal",
    "OnDisk",
    "OnHost",
    "Output",
    "Point",
    "StopForward",
    "Workspace",
    "added_point",
    "by_sequence",
    "calls_of",
    "capture_activations",
    "distributed",
    "drawn",
    "exclusive",
    "layout_when_free",
    "map_tensors",
    "model_outputs",
    "open_journal",
    "open_workspace",
    "output_scale",
    "outputs_of",
    "preserve_model_state",
    "receive_activations",
    "recompute_blocks",
    "record_block_calls",
    "record_gradients",
    "remove_journal",
    "replace_forwards",
    "replay_output",
    "residual_points",
    "residual_sum",
    "run_block",
    "run_identity",
    "run_model",
    "sequence_sums",
    "widen",
]
