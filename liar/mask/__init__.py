"""Which units stay: a frozen `Mask`, and the formats of masks made elsewhere; and masks of single weights."""

from liar.mask.compose import compose, keep_all
from liar.mask.formats import abridged
from liar.mask.mask import Mask
from liar.mask.weights import WeightMasks, apply_masks, hold_masks

__all__ = ["Mask", "WeightMasks", "abridged", "apply_masks", "compose", "hold_masks", "keep_all"]
