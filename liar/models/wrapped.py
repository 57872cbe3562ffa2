"""Models of sentence-transformers: found by what they have, since the package need not be installed."""

from __future__ import annotations

from typing import Any

from torch import nn

from liar.errors import ModelError


def transformer_in(model: Any) -> Any:
    """The transformer inside a `SentenceTransformer`, a `CrossEncoder` or the like; any other model as it is.

    Raises:
        ModelError: there are several inside.
    """
    if not isinstance(model, nn.Sequential):
        return model
    inside = {
        id(inner): inner for inner in (getattr(module, "auto_model", None) for module in model.modules()) if inner is not None
    }
    if len(inside) > 1:
        raise ModelError(
            f"the {type(model).__name__} has {len(inside)} transformers inside: pass one of them, as model[0].auto_model"
        )
    return next(iter(inside.values()), model)
