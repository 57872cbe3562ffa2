"""How much smaller and faster a pruned model is: parameters, file size, latency, tokens per second.

    python -m benchmarks.inference --model SMOLLM2 --keep 0.8 0.5
    python -m benchmarks.inference --model MINILM --keep 0.5 --rounds 15 --no-compile

Masks are those of the default selection; weights need no repair to be timed. The dense and the slim model take turns, as they
are and by `torch.compile`, and the median of the ratios counts. Language models are also timed at reading a long prompt and at
writing (greedily, with a cache; not compiled). Runs that are in results/inference.jsonl are skipped.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import liar
from benchmarks.demo import paragraphs
from benchmarks.results import RESULTS, Record, ResultFile
from benchmarks.summary import lined

# For the selection.
TOKENS = 8_192
LENGTH = 128
PROMPT, WRITTEN = 512, 64
HEADINGS = ("model", "kept", "what", "dense", "slim", "faster by")

Work = Callable[[nn.Module], Any]


def loaded(folder: str) -> tuple[Any, Any]:
    """(model in evaluation mode, tokenizer): with its head if it is a language model."""
    kinds = AutoConfig.from_pretrained(folder).architectures or [""]
    model = (AutoModelForCausalLM if kinds[0].endswith("ForCausalLM") else AutoModel).from_pretrained(folder)
    return model.train(False), AutoTokenizer.from_pretrained(folder)


def slim_copy(model: nn.Module, tokenizer: Any, keep: float) -> nn.Module:
    """The model without what the default selection removes."""
    texts = [text for part in paragraphs() for text in part]
    batches = liar.calibration(texts, tokenizer, tokens=TOKENS, max_length=LENGTH)
    pruned = copy.deepcopy(model)
    liar.remove(pruned, liar.select(model, batches, keep=keep, progress=False))
    return pruned


def megabytes(model: Any) -> float:
    """Of the weights on disk."""
    with tempfile.TemporaryDirectory() as folder:
        liar.save(model, f"{folder}/model")
        return sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors")) / 1e6


def tokens_of(model: Any, batch_size: int, length: int) -> Tensor:
    """Random tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(10, model.config.vocab_size, (batch_size, length), generator=generator)


def forward(model: nn.Module, *, ids: Tensor) -> None:
    """One pass."""
    model(input_ids=ids)


def write(model: Any, *, ids: Tensor) -> None:
    """Go on with a text."""
    model.generate(ids, max_new_tokens=WRITTEN, min_new_tokens=WRITTEN, do_sample=False, pad_token_id=0)


def works(model: Any) -> dict[str, Work]:
    """What is timed."""
    found: dict[str, Work] = {f"{size} x {LENGTH}": partial(forward, ids=tokens_of(model, size, LENGTH)) for size in (1, 8)}
    if hasattr(model, "lm_head"):
        found[f"read {PROMPT}"] = partial(forward, ids=tokens_of(model, 1, PROMPT))
        found[f"write {WRITTEN}"] = partial(write, ids=tokens_of(model, 1, 32))
    return found


@torch.inference_mode()
def seconds(work: Work, model: nn.Module) -> float:
    """Of one run."""
    began = time.perf_counter()
    work(model)
    return time.perf_counter() - began


def measure(folder: str, keep: float, rounds: int, *, compiles: bool) -> Record:
    """Sizes, and the seconds of both models in turns."""
    dense, tokenizer = loaded(folder)
    slim = slim_copy(dense, tokenizer, keep)
    pairs: dict[str, tuple[Work, nn.Module, nn.Module]] = {name: (work, dense, slim) for name, work in works(dense).items()}
    if compiles:
        compiled: Any = torch.compile(dense), torch.compile(slim)
        pairs |= {f"{name}, compiled": (work, *compiled) for name, (work, *_) in pairs.items() if "write" not in name}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in pairs}
    # The first round warms up, and compiles.
    for turn in tqdm(range(rounds + 1), desc="rounds"):
        for name, (work, *both) in pairs.items():
            measured = seconds(work, both[0]), seconds(work, both[1])
            if turn:
                times[name].append(measured)
    return {
        "parameters": [sum(p.numel() for p in model.parameters()) for model in (dense, slim)],
        "megabytes": [megabytes(model) for model in (dense, slim)],
        "seconds": {name: [median(column) for column in zip(*rows, strict=True)] for name, rows in times.items()},
        "faster": {name: median(long / short for long, short in rows) for name, rows in times.items()},
        "rounds": rounds,
    }


def rows(run: Mapping[str, Any]) -> list[list[str]]:
    """One run as rows of the table."""
    begin = [run["model"], f"{run['keep']:.0%}"]
    found = [
        [*begin, "parameters", *(f"{number / 1e6:.1f} M" for number in run["parameters"]), ""],
        [*begin, "file", *(f"{number:.0f} MB" for number in run["megabytes"]), ""],
    ]
    for name, both in run["seconds"].items():
        shown = (
            (f"{WRITTEN / each:.1f} tokens/s" for each in both)
            if "write" in name
            else (f"{1000 * each:.0f} ms" for each in both)
        )
        found.append([*begin, name, *shown, f"{run['faster'][name]:.2f}x"])
    return found


def table(records: list[Record]) -> str:
    """Of all runs, in Markdown."""
    return lined(HEADINGS, [row for record in records for row in rows(record)])


def main() -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder, or name on the hub")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.5])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="time torch.compile as well")
    parser.add_argument("--results", type=Path, default=RESULTS / "inference.jsonl")
    arguments = parser.parse_args()
    file, shown = ResultFile(arguments.results), Table(*HEADINGS)
    for keep in arguments.keep:
        key = {"model": Path(arguments.model).name, "keep": keep, "compile": arguments.compile}
        run = partial(measure, arguments.model, keep, arguments.rounds, compiles=arguments.compile)
        for row in rows(file.get_or_run(key, run)):
            shown.add_row(*row)
    Console(width=120).print(shown)


if __name__ == "__main__":
    main()
