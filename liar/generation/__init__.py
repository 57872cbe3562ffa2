"""Calibration texts that the dense model writes itself."""

from liar.generation.generate import SelfGenerated, self_generate

__all__ = ["SelfGenerated", "self_generate"]
