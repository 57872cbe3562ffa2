"""Attention that has lost all its heads: it adds nothing, in the place and of the class where others look for it."""

from __future__ import annotations

from functools import cache
from typing import Any, cast

from torch import Tensor, nn
from transformers import Cache

from liar.sites import Site


class _WithoutHeads(nn.Module):
    """In front of the stock class: only what is asked of attention whatever it computes.

    `_made_of`: the stock class; the consumer's name inside the module, None where it is called elsewhere; the block's number.
    """

    _made_of: tuple[Any, str | None, int]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """What attention returns: (what the consumer reads or writes, attention weights)."""
        _, consumer, layer = self._made_of
        nothing = hidden_states[..., :0]
        for known in (value for value in (*args, *kwargs.values()) if isinstance(value, Cache)):
            # One key of size 1 per token: the length of the text is asked of the cache of one layer, and that may be this one.
            # Some caches count the keys that are not zero.
            mark = hidden_states.new_ones(len(hidden_states), 1, hidden_states.shape[1], 1)
            own = getattr(known, "self_attention_cache", known)
            own.update(mark, mark, layer, {"cache_position": kwargs.get("cache_position")})
        return nothing if consumer is None else self.get_submodule(consumer)(nothing), None

    def extra_repr(self) -> str:
        """Shown where the model is printed."""
        return "no heads"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """The class is made while the program runs, so a pickle says from what."""
        parts = super().__reduce_ex__(protocol)
        assert isinstance(parts, tuple), "a module has a state"
        return (_blank, self._made_of, *parts[2:])


def without_heads(mixer: nn.Module, site: Site) -> None:
    """Turn the attention module of a site, whose layers have been cut to no channels, into one that does not compute any.

    Stock attention would ask its kernels to take tensors without elements, and a cache of keys without elements forgets how
    long the text is. The module stays the same object with its layers, hooks and buffers, and an instance of its class.
    """
    inside, stock = f"{site.mixer}.", cast("Any", type(mixer))
    consumer = site.consumer.module.removeprefix(inside) if site.consumer.module.startswith(inside) else None
    mixer.__class__ = _class_of(stock, consumer, site.layer)


@cache
def _class_of(stock: Any, consumer: str | None, layer: int) -> type[nn.Module]:
    known = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "_made_of": (stock, consumer, layer)}
    return type(stock.__name__, (_WithoutHeads, stock), known)


def _blank(stock: Any, consumer: str | None, layer: int) -> nn.Module:
    kind = _class_of(stock, consumer, layer)
    return kind.__new__(kind)
