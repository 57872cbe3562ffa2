"""Calibration texts: everything that might be in a column, and tokenizers that frame and pad texts or do neither."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import command
from hypothesis import example
from hypothesis import strategies as st
from strategies import ODD, TEXTS, inputs
from unchanged import Refused, attempt

import liar
from liar.testing import tiny_model

MODEL = tiny_model("bert")


class _OwnError(Exception):
    """What goes wrong in the user's own generator, which may come through."""


def _interrupted(texts):
    yield from texts
    raise _OwnError


WORDS = st.lists(st.integers(0, 85).map(lambda number: f"w{number}"), min_size=1, max_size=12).map(" ".join)
SHORT = st.one_of(WORDS, TEXTS, st.text(max_size=20))
TEXT = st.one_of(
    SHORT,
    st.sampled_from(["w1 " * 300, "w1 " * 40_000, "\0", "\u200b", "[CLS] [SEP]", "[PAD] [PAD] w1", "x" * 100_000]),
)
PAIR = st.tuples(SHORT, SHORT)
ITEM = st.one_of(TEXT, st.lists(SHORT | ODD, max_size=3), PAIR, ODD)
LISTS = st.one_of(
    st.lists(TEXT, min_size=1, max_size=6),
    st.lists(TEXT | PAIR, min_size=1, max_size=4),
    st.lists(ITEM, min_size=1, max_size=4),
)
# Ways to give them.
WAYS = {"list": list, "tuple": tuple, "generator": lambda texts: (text for text in texts), "interrupted": _interrupted}
SOURCES = st.one_of(LISTS, LISTS, LISTS, st.dictionaries(TEXTS, ITEM, max_size=3), ODD)
OPTIONS = st.fixed_dictionaries({
    "max_length": st.integers(1, 300),
    "batch_size": st.integers(1, 5),
    "tokens": st.none() | st.integers(1, 300),
    "pack": st.booleans(),
    "mixed_lengths": st.booleans(),
})  # fmt: skip


# half of a character
@example(framed=True, way="list", texts=["a\ud800"], options={})
@example(framed=True, way="list", texts=["a\ud800"], options={"pack": True})
# no token
@example(framed=False, way="list", texts=["\u200b"], options={})
# room for the frame only
@example(framed=True, way="list", texts=["w1"], options={"max_length": 1})
@example(framed=True, way="list", texts=None, options={})
@example(framed=True, way="list", texts=np.array(7), options={})
@inputs(130, framed=st.booleans(), way=st.sampled_from(list(WAYS)), texts=SOURCES, options=OPTIONS)
def test_texts(tokenizer, plain_tokenizer, framed, way, texts, options):
    used = tokenizer if framed else plain_tokenizer
    before = used.backend_tokenizer.to_str(), dict(used.init_kwargs)
    source = WAYS[way](texts) if isinstance(texts, list) else texts
    batches = attempt(lambda: liar.calibration(source, used, **options), own=_OwnError)
    assert (used.backend_tokenizer.to_str(), dict(used.init_kwargs)) == before
    if not isinstance(batches, Refused):
        assert all(batch["input_ids"].shape == batch["attention_mask"].shape for batch in batches)
        assert max(batch["input_ids"].shape[1] for batch in batches) <= options.get("max_length", 256)
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        assert 1 <= tokens <= (options.get("tokens") or tokens)
        assert liar.Calibration.of(batches, MODEL).tokens == tokens


@inputs(20, used=ODD)
def test_what_is_no_tokenizer(used):
    attempt(lambda: liar.calibration(["w1 w2"], used))


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, which tells a process its peak of memory")
def test_two_long_texts_take_little_memory(tokenizer):
    """The library of tokenizers, asked to cut a pair, keeps every piece of the one beside every piece of the other."""

    def peak():
        return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)

    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is used now
    before = peak()
    batches = liar.calibration([("w1 " * 1500, "w2 " * 1500)], tokenizer, max_length=16)
    assert batches[0]["input_ids"].shape == (1, 16)
    assert peak() < before + 100_000  # kB


def _lines(rows):
    return "\n".join(json.dumps(row) for row in rows).encode()


FILES = st.one_of(
    st.tuples(st.just("texts.jsonl"), st.lists(st.dictionaries(st.just("text"), ITEM.filter(lambda _: False) | TEXT | st.none()
        | st.integers() | st.lists(TEXT | st.none(), max_size=2))).map(_lines)),
    st.tuples(st.sampled_from(["texts.txt", "texts.json", "texts.jsonl", "texts.csv", "texts.parquet", "texts.txt.gz"]),
        st.binary(max_size=30) | TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.just(b"text\nw1 w2\n")),
)  # fmt: skip


@inputs(30, file=FILES)
def test_files(home, file):
    name, content = file
    path, out = home / name, home / "mask.json"
    earlier = path.read_bytes() if path.exists() else None
    path.write_bytes(content)
    try:
        arguments = ["select", home / "bert", out, "--keep", 0.5, "--criterion", "wanda", "--calib", path, "--tokens", 300]
        if not isinstance(command(*arguments, folder=home), Refused):
            liar.Mask.load(out)
    finally:
        out.unlink(missing_ok=True)
        path.unlink() if earlier is None else path.write_bytes(earlier)
