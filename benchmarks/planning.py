"""Whether `liar.plan` is right: what runs were said to need, beside what they took.

    python -m benchmarks.planning --model FOLDER [--cases llama minilm ...]

Every case is pruned in a process of its own: random LLaMAs, all-MiniLM-L6-v2 on text, and SmolLM2-135M (its folder is --model)
on text. Peak memory is the growth of the resident set over what it was before the model was loaded. Large tensors are mapped
by themselves, as the command line lets the C library do. Time is that of the processor, since others may use the machine; the
rates that the estimate rests on are measured in the same process right before. Cases that are in results/planning.jsonl are
skipped.

    python -m benchmarks.planning --sizes

plans models of several sizes, of which there is no more than a configuration, into results/planning_sizes.jsonl.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import logging
import multiprocessing
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import liar
from benchmarks.demo import paragraphs
from benchmarks.results import RESULTS, Record, ResultFile
from benchmarks.speed import growth_of_memory, minilm, random_llama
from liar.cli.memory import map_large_tensors
from liar.planning.plan import amount
from liar.testing import tiny_batches, tiny_model

FILE = RESULTS / "planning.jsonl"
Loaded = tuple[nn.Module, list[dict[str, Tensor]]]
HEADINGS = ("case", "tokens", "peak memory: plan", "measured", "time: plan", "measured")
SIZES_FILE = RESULTS / "planning_sizes.jsonl"
SIZE_HEADINGS = (
    "model", "weights", "activations on the device", "in host memory: device, host", "on disk: device, disk",
    "blocks offloaded: device, host", "10^15 operations", "one CPU thread",
)  # fmt: skip
# 128 sequences of 2,048 tokens, one at a time.
SIZE_OPTIONS: dict[str, Any] = {"keep": 0.5, "max_length": 2_048, "batch_size": 1, "dtype": "bfloat16"}
SIZE_TOKENS = 128 * 2_048


def smollm2(tokens: int, folder: Path | None, *, length: int) -> Loaded:
    """A real LLaMA with its head on real text, in full sequences."""
    assert folder is not None
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = [text for part in paragraphs() for text in part]
    return model, liar.calibration(texts, tokenizer, tokens=tokens, max_length=length, batch_size=2048 // length, pack=True)


# Name -> the model and its data by tokens and folder, tokens, options of `prune`.
CASES: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "LLaMA, 4 layers of 512": (random_llama, 32_768, {"keep": 0.5}),
    "LLaMA, 2 layers of 1,024": (
        partial(random_llama, width=1024, feed_forward=2752, layers=2),
        8_192,
        {"keep": 0.5},
    ),
    "LLaMA, 2 layers of 1,024, balanced": (
        partial(random_llama, width=1024, feed_forward=2752, layers=2),
        8_192,
        {"keep": 0.5, "widths": "balanced"},
    ),
    "LLaMA, layer_output": (random_llama, 32_768, {"keep": 0.5, "target": "layer_output", "criterion": "fluctuation"}),
    "MiniLM": (minilm, 32_768, {"keep": 0.5}),
    "MiniLM, few tokens": (minilm, 2_048, {"keep": 0.5}),
    "SmolLM2-135M": (partial(smollm2, length=512), 8_192, {"keep": 0.8}),
    "SmolLM2-135M, sequences of 1,024": (partial(smollm2, length=1024), 8_192, {"keep": 0.8}),
}


def llama(
    layers: int, hidden: int, feed_forward: int, heads: int, groups: int, classes: int, *, tied: bool = False
) -> LlamaConfig:
    """The shape of a released model."""
    return LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=classes,
        tie_word_embeddings=tied,
        max_position_embeddings=8_192,
        architectures=["LlamaForCausalLM"],
    )


SIZES = {
    "SmolLM2-135M": llama(30, 576, 1_536, 9, 3, 49_152, tied=True),
    "LLaMA-3.2-1B": llama(16, 2_048, 8_192, 32, 8, 128_256, tied=True),
    "LLaMA-2-7B": llama(32, 4_096, 11_008, 32, 32, 32_000),
    "LLaMA-2-70B": llama(80, 8_192, 28_672, 64, 8, 32_000),
}


def plan_size(name: str) -> Record:
    """A model by its configuration: memory on a GPU, operations, and time on one thread of this CPU."""
    torch.set_num_threads(1)
    on_gpu = liar.plan(SIZES[name], SIZE_TOKENS, device="cuda", measure=False, **SIZE_OPTIONS)
    offloaded = liar.plan(
        SIZES[name], SIZE_TOKENS, device="cuda", measure=False, offload=True, activations="host", **SIZE_OPTIONS
    )
    # Products in 16 bits are slow on many CPUs.
    on_cpu = liar.plan(SIZES[name], SIZE_TOKENS, **{**SIZE_OPTIONS, "dtype": "float32"})
    assert on_cpu.seconds is not None
    return {
        "parameters": on_gpu.parameters,
        "weights": on_gpu.model_bytes,
        "memory": {place: asdict(need) for place, need in on_gpu.memory.items()},
        "offloaded": asdict(offloaded.memory["host"]),
        "operations": sum(on_gpu.flops.values()),
        "seconds": sum(on_cpu.seconds.values()),
    }


def size_row(record: Mapping[str, Any]) -> list[str]:
    """One size in the table."""
    memory = record["memory"]
    pairs = [(memory["host"], "host"), (memory["disk"], "disk"), (record["offloaded"], "host")]
    cells = [", ".join((amount(need["device"]), amount(need[place]))) for need, place in pairs]
    hours = f"{record['seconds'] / 3600:,.1f} h"
    return [
        record["model"], amount(record["weights"]), amount(memory["device"]["device"]), *cells,
        f"{record['operations'] / 1e15:,.1f}", hours,
    ]  # fmt: skip


def measure(name: str, folder: Path | None) -> Record:
    """One case, in this process."""
    load, tokens, options = CASES[name]
    torch.set_num_threads(1)
    map_large_tensors()
    warm_up()
    started = psutil.Process().memory_info().rss
    model, batches = load(tokens, folder)
    planned = liar.plan(model, batches, activations="device", **options)
    # What planning and loading have left behind.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = psutil.Process().memory_info().rss
    seconds: dict[str, float] = {}

    def run() -> None:
        began = time.perf_counter(), time.process_time()
        report = liar.prune(model, batches, progress=False, **options)
        seconds.update(wall=time.perf_counter() - began[0], processor=time.process_time() - began[1])
        seconds.update(report.seconds)

    grown = growth_of_memory(run)
    need = planned.memory["device"]
    assert planned.seconds is not None
    return {
        "tokens": planned.tokens,
        "options": options,
        "model_bytes": planned.model_bytes,
        "memory": {"planned": need.host, "measured": grown + before - started},
        "when": f"{need.stage}: {need.phase}",
        "seconds": {"planned": sum(planned.seconds.values()), "measured": seconds["processor"], "wall": seconds["wall"]},
        "stages": {
            "planned": planned.seconds,
            "measured": {k: v for k, v in seconds.items() if k not in ("wall", "processor")},
        },
        "rates": vars(planned.rates),
    }


def warm_up() -> None:
    """Plan and prune a tiny model, so that what libraries load once is there."""
    model = tiny_model("llama", head="causal-lm")
    batches = tiny_batches(model)
    liar.plan(model, batches, keep=0.5)
    liar.prune(model, batches, keep=0.5, progress=False)


def apart(name: str, folder: Path | None) -> Record:
    """One case in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, name, folder).result()


def main() -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", choices=list(CASES), nargs="+", default=list(CASES))
    parser.add_argument("--model", type=Path, help="folder of SmolLM2-135M")
    parser.add_argument("--sizes", action="store_true", help="plan models of several sizes")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if arguments.sizes:
        sizes, planned = ResultFile(SIZES_FILE), Table(*SIZE_HEADINGS)
        for name in SIZES:
            planned.add_row(*size_row(sizes.get_or_run({"model": name}, partial(plan_size, name))))
        Console(width=180).print(planned)
        return
    file = ResultFile(FILE)
    table = Table(*HEADINGS)
    for name in arguments.cases:
        record = file.get_or_run({"case": name}, partial(apart, name, arguments.model))
        table.add_row(*row(record))
    Console(width=180).print(table)


def row(record: Mapping[str, Any]) -> list[str]:
    """One case in the table."""
    cells = [record["case"], f"{record['tokens']:,}"]
    cells += [f"{record['memory'][which] / 1e6:,.0f} MB" for which in ("planned", "measured")]
    return cells + [f"{record['seconds'][which]:,.1f} s" for which in ("planned", "measured")]


if __name__ == "__main__":
    main()
