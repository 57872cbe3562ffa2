"""Looking inside: moments of a dense model's activations, and how kept units stand in for removed ones."""

from liar.analysis.interpolation import Interpolation, interpolation
from liar.analysis.moments import channel_moments, moments

__all__ = ["Interpolation", "channel_moments", "interpolation", "moments"]
