"""`self_generate`: the dense model writes calibration texts, and those that are in no language are rejected."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from torch import nn

from liar.errors import CalibrationError
from liar.generation.language import language_check
from liar.generation.records import GeneratedText, TextFile
from liar.generation.sampling import Vocabulary, batch_seed, check_generator, sample_texts
from liar.options import GenerateOptions
from liar.progress import ProgressOption, progress_of
from liar.runtime import exclusive, preserve_model_state

# After so many texts, at least this share has to be language.
TRIES, LEAST = 256, 0.05


@dataclass(frozen=True)
class SelfGenerated:
    """What a model has written; frozen.

    Attributes:
        records: the texts that were kept, with their tokens.
        rejected: how many were not, before the last that was.

    Example:
        >>> written = SelfGenerated((), rejected=0)
        >>> written.texts, written.tokens
        ([], 0)
    """

    records: tuple[GeneratedText, ...]
    rejected: int

    @property
    def texts(self) -> list[str]:
        """The texts, for `liar.calibration`."""
        return [record.text for record in self.records]

    @property
    def tokens(self) -> int:
        """Tokens in all of them."""
        return _tokens(self.records)


def self_generate(
    model: nn.Module,
    tokenizer: Any,
    *,
    tokens: int,
    max_length: int = GenerateOptions.max_length,
    batch_size: int = GenerateOptions.batch_size,
    language: str = GenerateOptions.language,
    seed: int = GenerateOptions.seed,
    file: str | Path | None = None,
    progress: ProgressOption = True,
) -> SelfGenerated:
    """Let a language model write calibration texts, as Shin et al. 2024 do for reconstruction.

    The first token of a text is random, the next four are the most probable ones, and from there the model samples at
    temperature 1 until it ends the text or `max_length` is reached. Texts that are in no language are rejected.

    Args:
        model: a causal language model of Hugging Face, pruned or not, of any family; it is not changed.
        tokenizer: its tokenizer, with an end token.
        tokens: how many to generate at least, without those of rejected texts.
        max_length: tokens per text, at most; not more than the model takes.
        batch_size: texts that are generated at a time; with another number the texts are others.
        language: `"any"`: texts that are most likely in some natural language; the code of one, such as `"en"`; `"off"`: all
            texts. Telling languages needs the extra `language`.
        seed: for the tokens that are drawn.
        file: JSON lines with `text` and `input_ids` that are written as texts come. If it is there, texts are added to it: a
            run that was stopped goes on, and the file is the same in the end.
        progress: show a bar, or a function that is called in its place (see `ProgressUpdate`).

    Returns:
        A `SelfGenerated`, whose `texts` join others in `liar.calibration`.

    Raises:
        OptionError, CalibrationError, CheckpointError, ModelError: with what was expected, what came, and what to do.

    Example:
        >>> import copy
        >>> from liar.testing import tiny_model
        >>> writer, own = tiny_model("llama", head="causal-lm"), copy.deepcopy(tokenizer)
        >>> own.eos_token = "[SEP]"  # the tokenizer of a language model has one
        >>> written = liar.self_generate(writer, own, tokens=60, max_length=16, language="off")
        >>> written.tokens >= 60
        True
        >>> calib = liar.calibration(written.texts, own)
    """
    options = GenerateOptions(tokens, max_length, batch_size, language, seed).checked()
    check_generator(model, options.max_length)
    vocabulary, is_kept = Vocabulary.of(model, tokenizer), language_check(options.language)
    written = None if file is None else TextFile(file, options.batch_size)
    with (
        exclusive(model),
        preserve_model_state(model),
        progress_of(progress, "self_generate", {"write": 1}) as shown,
        shown.stage("write", options.tokens) as advance,
    ):
        batches = _batches(model, tokenizer, vocabulary, options, 0 if written is None else written.batch)
        records = _enough(written.texts if written else [], options.tokens)
        advance(_tokens(records))
        unchecked = written is not None and written.has_rest
        while (left := options.tokens - _tokens(records)) > 0 or unchecked:
            tried, texts = next(batches)
            kept = [text for text in texts if is_kept(text.text)]
            if written is not None and unchecked:
                # Also where the file has enough texts: they may be of other settings.
                written.check(kept)
                unchecked = False
            kept = _enough(kept, left)
            if written is not None:
                written.write(kept)
            records += kept
            advance(_tokens(kept))
            _check_share(len(records), tried, texts[-1], options.language)
    return SelfGenerated(tuple(records), rejected=records[-1].number + 1 - len(records))


def _batches(
    model: nn.Module, tokenizer: Any, vocabulary: Vocabulary, options: GenerateOptions, first: int
) -> Iterator[tuple[int, list[GeneratedText]]]:
    """The texts of one batch after the other, without end, and how many there were with them."""
    for batch in count(first):
        start, seed = batch * options.batch_size, batch_seed(options.seed, batch)
        rows = sample_texts(model, vocabulary, options.batch_size, options.max_length, seed)
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in rows]
        pairs = zip(texts, rows, strict=True)
        yield start + len(rows), [GeneratedText(start + row, text, ids) for row, (text, ids) in enumerate(pairs)]


def _tokens(records: Iterable[GeneratedText]) -> int:
    return sum(len(record.input_ids) for record in records)


def _enough(records: Iterable[GeneratedText], tokens: int) -> list[GeneratedText]:
    """The first texts with so many tokens together; all where there are fewer."""
    taken: list[GeneratedText] = []
    for record in records:
        if tokens <= 0:
            break
        taken.append(record)
        tokens -= len(record.input_ids)
    return taken


def _check_share(kept: int, tried: int, last: GeneratedText, language: str) -> None:
    """Check that the model writes what is asked for.

    Raises:
        CalibrationError: nearly all texts are rejected.
    """
    if tried >= TRIES and kept < LEAST * tried:
        raise CalibrationError(
            f"of the first {tried} texts that the model wrote {kept} are kept with language={language!r}; the last one is "
            f"{last.text[:100]!r}. Is the model trained, and the tokenizer its own? Keep all texts with language='off'"
        )
