"""The jobs that are interrupted: command lines on a tiny model, and the library's writers of single files."""

import random
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import liar
from liar.cli import main
from liar.testing import tiny_batches, tiny_model

# Budgets that take turns, so that the model before and the one after a save differ in every file of their own.
KEEPS = (0.4, 0.6, 0.8)
WORDS = ["[PAD]", "[UNK]", *(f"w{number}" for number in range(90))]


def make_home(home: Path, seed: int) -> None:
    """A model with a tokenizer, and texts."""
    datasets.config.HF_DATASETS_CACHE = home / "cache"
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    # Embeddings that make writing the weights last a while.
    tiny_model("bert", seed=seed, vocab_size=5000).save_pretrained(home / "model")
    tokenizer.save_pretrained(home / "model")
    draw = random.Random(seed)
    lines = (" ".join(draw.choices(WORDS[2:], k=20)) for _ in range(60))
    (home / "texts.txt").write_text("\n".join(lines))


def command(*arguments: object) -> int:
    """`liar ARGUMENTS` in this process; the exit code."""
    sys.argv = ["liar", *map(str, arguments)]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def prune(home: Path, out: Path, job: int) -> int:
    """The budget of a number, over whatever model is there."""
    options = ["--criterion", "magnitude", "--calib", home / "texts.txt", "--force"]
    return command("prune", home / "model", out, "--keep", KEEPS[job], *options)


def file_jobs(home: Path, slim: Path) -> dict[str, Callable[[Path], int]]:
    """Everything that writes a single file, by the file's name."""
    model = tiny_model("bert")
    costs, statistics = liar.flops(model), liar.collect(model, tiny_batches(model), progress=False)
    report, mask = liar.Report.load(slim / "report.json"), liar.Mask.load(slim / "mask.json")

    def library(write: Callable[[Path], object]) -> Callable[[Path], int]:
        def job(path: Path) -> int:
            try:
                write(path)
            except liar.LiarError as error:
                sys.stderr.write(f"Error: {error}\n")
                return 1
            return 0

        return job

    def select(path: Path) -> int:
        return command("select", home / "model", path, "--keep", "0.5", "--criterion", "magnitude", "--force")

    def figure(path: Path) -> int:
        return command("report", slim, "--plot", path, "--force")

    return {
        "mask.json": select,
        "costs.json": library(costs.save),
        "report.json": library(report.save),
        "statistics.safetensors": library(statistics.save),
        "figure.png": figure,
        "figure.pdf": figure,
        "figure.svg": library(lambda path: liar.plot(mask, path)),
    }
