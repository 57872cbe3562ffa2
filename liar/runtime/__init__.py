"""Running a model block by block and reading its activations; the user's model is left as it was."""

from liar.runtime.blocks import BlockCall, calls_of, record_block_calls, replace_forwards, run_block, run_model
from liar.runtime.hooks import Point, StopForward, capture_activations, replay_output
from liar.runtime.outputs import Output, drawn, model_outputs, outputs_of
from liar.runtime.state import exclusive, layout_when_free, preserve_model_state, record_gradients
from liar.runtime.store import ActivationStore
from liar.runtime.stream import added_point, by_sequence, output_scale, residual_points, residual_sum, sequence_sums, widen

__all__ = [
    "ActivationStore",
    "BlockCall",
    "Output",
    "Point",
    "StopForward",
    "added_point",
    "by_sequence",
    "calls_of",
    "capture_activations",
    "drawn",
    "exclusive",
    "layout_when_free",
    "model_outputs",
    "output_scale",
    "outputs_of",
    "preserve_model_state",
    "record_block_calls",
    "record_gradients",
    "replace_forwards",
    "replay_output",
    "residual_points",
    "residual_sum",
    "run_block",
    "run_model",
    "sequence_sums",
    "widen",
]
