"""Which units stay: a frozen `Mask`, and the formats of masks made elsewhere."""

from liar.mask.formats import abridged
from liar.mask.mask import Mask

__all__ = ["Mask", "abridged"]
