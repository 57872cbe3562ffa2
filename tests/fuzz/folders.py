"""A home with everything that the command line needs: a model `bert` with its tokenizer, and `texts.txt`."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from liar.testing import tiny_model


def _files() -> dict[str, bytes]:
    words = Tokenizer(
        WordLevel({word: i for i, word in enumerate(["[PAD]", "[UNK]", *(f"w{n}" for n in range(90))])}, unk_token="[UNK]")
    )
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    with tempfile.TemporaryDirectory() as folder:
        tiny_model("bert").save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


BERT = _files()
_WORDS = [f"w{(7 * number) % 80}" for number in range(600)]
TEXTS = "\n".join(" ".join(_WORDS[start : start + 12]) for start in range(0, 600, 12))


def fill(home: Path) -> None:
    """Write all of it into a folder."""
    (home / "bert").mkdir()
    for name, content in BERT.items():
        (home / "bert" / name).write_bytes(content)
    (home / "texts.txt").write_text(TEXTS)
