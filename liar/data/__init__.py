"""From texts to batches a model takes, with what is known of their tokens."""

from liar.data.calibration_data import FOLDS, Calibration
from liar.data.decoder import IGNORED
from liar.data.held_out import distinct_from, set_aside
from liar.data.sample import evenly, sample, sample_tokens, split, spread, take, take_batches, take_sequences
from liar.data.sentences import read_by, transformer_and_data
from liar.data.texts import builder_of, texts
from liar.data.tokenise import calibration

__all__ = [
    "FOLDS",
    "IGNORED",
    "Calibration",
    "builder_of",
    "calibration",
    "distinct_from",
    "evenly",
    "read_by",
    "sample",
    "sample_tokens",
    "set_aside",
    "split",
    "spread",
    "take",
    "take_batches",
    "take_sequences",
    "texts",
    "transformer_and_data",
]
