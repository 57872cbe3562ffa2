"""Attention that has lost all its heads: it adds nothing, in the place and of the class where others look for it."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn

from liar.sites import Site


class _WithoutHeads(nn.Module):
    """In front of the stock class: only what is asked of attention whatever it computes.

    `consumer` is the consumer's name inside the module, None where it is called elsewhere.
    """

    consumer: str | None
    stock: Any

    def forward(self, hidden_states: Tensor, *_: Any, past_key_values: Any = None, **__: Any) -> tuple[Tensor, None]:
        """What the stock class returns: (what the consumer reads or writes, attention weights)."""
        nothing = hidden_states[..., :0]
        if past_key_values is not None:
            # The length of the text is asked of the cache of one layer, and that may be this one.
            mark = hidden_states.new_zeros(len(hidden_states), 1, hidden_states.shape[1], 1)
            getattr(past_key_values, "self_attention_cache", past_key_values).update(mark, mark, self.layer_idx)
        return nothing if self.consumer is None else self.get_submodule(self.consumer)(nothing), None

    def extra_repr(self) -> str:
        """Shown where the model is printed."""
        return "no heads"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """The class is made while the program runs, so a pickle says from what."""
        parts = super().__reduce_ex__(protocol)
        assert isinstance(parts, tuple), "a module has a state"
        return (_blank, (self.stock, self.consumer), *parts[2:])


def without_heads(mixer: nn.Module, site: Site) -> None:
    """Turn the attention module of a site, whose layers have been cut to no channels, into one that does not compute any.

    Stock attention cannot run without heads: the number of heads is read off shapes that then have no elements. The module
    stays the same object with its layers, hooks and buffers, and an instance of its class.
    """
    inside = f"{site.mixer}."
    consumer = site.consumer.module.removeprefix(inside) if site.consumer.module.startswith(inside) else None
    stock: Any = type(mixer)
    mixer.__class__ = _class_of(stock, consumer)


@cache
def _class_of(stock: Any, consumer: str | None) -> type[nn.Module]:
    names = {"consumer": consumer, "stock": stock, "__module__": stock.__module__, "__qualname__": stock.__qualname__}
    return type(stock.__name__, (_WithoutHeads, stock), names)


def _blank(stock: Any, consumer: str | None) -> nn.Module:
    kind = _class_of(stock, consumer)
    return kind.__new__(kind)
