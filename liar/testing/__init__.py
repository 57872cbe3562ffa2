"""Tiny random models, and the contract every family must pass: for this library's tests and for families made elsewhere.

Example:
    >>> from liar.testing import check_family, tiny_model
    >>> layout = check_family(tiny_model("llama"))
    >>> [site.name for site in layout.sites]
    ['heads.0', 'neurons.0', 'heads.1', 'neurons.1']
"""

from liar.testing.contract import check_family
from liar.testing.state import assert_same_state, model_state
from liar.testing.tiny import randomise, tiny_batches, tiny_model

__all__ = ["assert_same_state", "check_family", "model_state", "randomise", "tiny_batches", "tiny_model"]
