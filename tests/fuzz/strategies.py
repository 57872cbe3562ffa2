"""How often, and with what: `inputs` makes a test of so many examples; the rest are values no one should pass.

A plain run of pytest tries the same `PLAIN` inputs every time, in about a minute. With the environment variable
`LIAR_FUZZ=N` (`make fuzz`) there are N in all, other ones every time; those that fail are kept in `.hypothesis` and come first
in the next run. What was once found is written down beside its test, as an `@example`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from copy import deepcopy
from fractions import Fraction
from functools import wraps
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

# The sum of what the tests ask for, which test_fuzzed_json.py checks.
PLAIN = 1770
TOTAL = int(os.environ.get("LIAR_FUZZ", PLAIN))
LONG = TOTAL > PLAIN

asked: dict[str, int] = {}
# Shows how far a long run is; tests/fuzz/conftest.py puts a function here that writes past pytest's capture.
tell: list[Callable[[str], None]] = []


def inputs(count: int, **given_strategies: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A test of `count` of the `PLAIN` inputs, drawn from strategies by the name of an argument."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        name = f"{test.__module__}.{test.__name__}"
        asked[name] = count
        number = max(1, round(count * TOTAL / PLAIN))
        done = 0

        @wraps(test)
        def counted(*args: Any, **kwargs: Any) -> None:
            nonlocal done
            done += 1
            if LONG and tell and done % max(number // 5, 1) == 0:
                tell[-1](f"\n{name}: {done} of {number} ")
            test(*args, **kwargs)

        profile = settings(
            deadline=None,
            max_examples=number,
            derandomize=not LONG,
            print_blob=True,
            report_multiple_bugs=True,
            suppress_health_check=list(HealthCheck),
            phases=[phase for phase in Phase if phase is not Phase.explain],
            **({} if LONG else {"database": None}),
        )
        return profile(given(**given_strategies)(counted))

    return decorate


HUGE = 10**400
INTEGERS = st.one_of(st.integers(-3, 70), st.sampled_from([2**31, -(2**31), 2**63 - 1, 2**63, 2**64, 10**30, HUGE, -HUGE]))
FLOATS = st.one_of(
    st.floats(0, 1), st.sampled_from([-0.5, 0.0, -0.0, 1.5, 5e-324, 1e-308, 1e308, float("nan"), float("inf"), float("-inf")])
)
# No separators of paths: what is written stays in the folder that a test watches.
TEXTS = st.one_of(
    st.text("ab 01é\x00\n\ud800😀{[%", max_size=6),
    st.sampled_from(["", " ", "auto", "cpu", "cuda", "params", "heads.0", "magnitude", "\udcff", "nan", "1e999", "x" * 5000]),
)
SCALARS = st.one_of(st.none(), st.booleans(), INTEGERS, FLOATS, TEXTS)
NUMPY = st.one_of(
    st.sampled_from([np.int8, np.int64, np.uint8, np.float16, np.float64, np.bool_]).map(lambda kind: kind(1)),
    st.sampled_from([np.array([]), np.array(["a"]), np.array([None, {}], dtype=object), np.array(7), np.eye(2) > 0]),
)
TENSORS = st.sampled_from([
    torch.tensor(1),
    torch.tensor(0.5),
    torch.tensor([]),
    torch.tensor([float("nan")]),
    torch.ones(2, 2),
    torch.tensor([1j]),
    torch.empty(3, device="meta"),
    torch.sparse_coo_tensor([[0]], [1.0], (4,), check_invariants=True),
])  # fmt: skip


def _raises(*_: Any) -> Any:
    raise RuntimeError("an object of the user's that raises")


class Raises:
    """Whatever is asked of it fails."""

    __bool__ = __len__ = __iter__ = __getitem__ = __float__ = __int__ = _raises


OBJECTS = st.sampled_from([object(), b"bytes", bytearray(b"\x00"), 1j, Fraction(1, 3), range(3), len, int, set(), {1, 2}, ...])
LEAVES = st.one_of(SCALARS, NUMPY, TENSORS, OBJECTS)
# Anything at all, also in lists, tuples and dicts.
ODD = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(TEXTS, st.integers(0, 3), st.none()), inner, max_size=3),
    ),
    max_leaves=6,
)

JSON = st.recursive(
    SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=3)), max_leaves=6
)
NASTY_TEXTS = st.sampled_from([
    "",
    " ",
    "null",
    "NaN",
    "-Infinity",
    "1e999",
    "{}",
    "[]",
    '""',
    "\ufeff{}",
    "{'a': 1}",
    '{"mask": {}}',
    "[" * 100_000,
    '{"a":' * 100_000,
    '{"mask":' * 1000 + "1" + "}" * 1000,
    "9" * 5000,
    '"\\ud800"',
])  # fmt: skip


@st.composite
def paths(draw: Any, value: Any) -> tuple[Any, ...]:
    """The way to a value inside a JSON value, or to itself: few steps as often as many."""
    path: list[Any] = []
    while value and isinstance(value, (dict, list)) and draw(st.integers(0, 5)) > (len(path) > 1):
        path.append(draw(st.sampled_from(list(value)) if isinstance(value, dict) else st.integers(0, len(value) - 1)))
        value = value[path[-1]]
    return tuple(path)


def _put(holder: Any, key: Any, value: Any) -> None:
    holder[key] = value


def replaced(value: Any, path: Sequence[Any], new: Any, change: Callable[[Any, Any, Any], None] = _put) -> Any:
    """A copy of a JSON value in which one inner value is another."""
    if not path:
        return new
    copied = deepcopy(value)
    holder = copied
    for key in path[:-1]:
        holder = holder[key]
    change(holder, path[-1], new)
    return copied


def with_value(text: str | bytes, *path: Any, new: Any) -> bytes:
    """A JSON text in which one inner value is another."""
    return json.dumps(replaced(json.loads(text), path, new)).encode()


@st.composite
def mutated(draw: Any, value: Any, news: Any = JSON | FLOATS | INTEGERS) -> Any:
    """A valid JSON value with one value inside replaced, left out, renamed, or put beside another one."""
    path = draw(paths(value))
    way, new = draw(st.sampled_from(["replace"] * 5 + ["drop", "rename", "repeat"])), draw(news)

    def change(holder: Any, key: Any, new: Any) -> None:
        if way == "drop":
            del holder[key]
        elif way == "rename" and isinstance(holder, dict):
            holder[draw(TEXTS)] = holder.pop(key)
        elif way == "repeat" and isinstance(holder, list):
            holder.insert(key, holder[key])
        else:
            holder[key] = new

    return replaced(value, path, new, change)


@st.composite
def json_files(draw: Any, text: str) -> bytes:
    """The content of a file that should be such a JSON text: damaged in some way, or something else."""
    way = draw(st.sampled_from(["mutated"] * 5 + ["twice", "nasty", "cut", "bytes", "any"]))
    if way == "cut":
        return text[: draw(st.integers(0, len(text)))].encode()
    if way == "bytes":
        return draw(st.binary(max_size=20))
    if way == "nasty":
        return draw(NASTY_TEXTS).encode()
    if way == "any":
        return json.dumps(draw(JSON)).encode()
    value = draw(mutated(json.loads(text)))
    if way == "twice":
        value = draw(mutated(value)) if isinstance(value, dict) else value
        key = draw(st.sampled_from(list(json.loads(text))))
        # The same key once more, before all others.
        return ("{" + f"{json.dumps(key)}: {json.dumps(draw(JSON))}, " + json.dumps(value)[1:]).encode()
    return json.dumps(value).encode()
