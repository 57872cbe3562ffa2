"""What a reconstruction costs, as a ratio to one plain dense forward pass over the same calibration tokens.

    python -m benchmarks.speed [--rounds 5] [--tokens 32768]

Two models: a random LLaMA (4 layers, hidden 512, feed-forward 1376, 8 query and 4 key/value heads) on random tokens, and
all-MiniLM-L6-v2 on the paragraphs of `pydoc_data.topics`; half of the block parameters kept, equally many units per layer. In
every round the plain pass and each reconstruction take turns; ratios are taken within a round, and the median over the rounds
counts. Peak memory is the growth of the resident set in a process of its own, beside the bound it should stay under.
"""

from __future__ import annotations

import argparse
import copy
import logging
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

import liar
from benchmarks.demo import paragraphs
from benchmarks.results import RESULTS, Record, ResultFile
from benchmarks.tasks import load_encoder
from liar.data import FOLDS
from liar.statistics.chunks import CHUNK

KEEP = 0.5
TARGETS = ("layer_output", "residual_stream")
HEADINGS = ("model", "tokens", "target", "time", "where it goes", "peak memory of bound")


def random_llama(tokens: int) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """A random model, and random sequences of 256 tokens in batches of 8."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    model = LlamaModel(config)
    model.train(False)
    return model, [{"input_ids": torch.randint(0, 1000, (8, 256))} for _ in range(tokens // 2048)]


def minilm(tokens: int) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """The real encoder on real text."""
    model, tokenizer = load_encoder(None)
    return model, liar.calibration([text for part in paragraphs() for text in part], tokenizer, tokens=tokens, max_length=128)


MODELS: dict[str, Callable[[int], tuple[nn.Module, list[dict[str, Tensor]]]]] = {"llama": random_llama, "minilm": minilm}


@torch.inference_mode()
def plain(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> None:
    """One dense forward pass over all batches."""
    for batch in batches:
        model(**batch)


def measure(name: str, tokens: int, rounds: int) -> dict[str, Any]:
    """Ratios and the breakdown of one model."""
    model, batches = MODELS[name](tokens)
    mask = half(model, batches)
    plain(model, batches)
    ratios: dict[str, list[float]] = {target: [] for target in TARGETS}
    stages: dict[str, list[dict[str, float]]] = {target: [] for target in TARGETS}
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        plain(model, batches)
        seconds.append(time.perf_counter() - began)
        for target, values in ratios.items():
            changed = copy.deepcopy(model)
            began = time.perf_counter()
            report = liar.reconstruct(changed, mask, batches, target=target, progress=False)
            values.append((time.perf_counter() - began) / seconds[-1])
            stages[target].append({stage: value / seconds[-1] for stage, value in report.seconds.items()})
    return {
        "keep": KEEP,
        "rounds": rounds,
        "plain_seconds_median": median(seconds),
        "ratio_median": {target: median(values) for target, values in ratios.items()},
        "ratios": ratios,
        "stages_median": {
            target: {stage: median(each[stage] for each in parts) for stage in parts[0]} for target, parts in stages.items()
        },
        "memory": {target: memory(name, tokens, target) for target in TARGETS},
    }


def half(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> liar.Mask:
    """Half of the parameters, equally many units per layer."""
    return liar.select(model, batches, keep=KEEP, criterion="fluctuation", widths="balanced", progress=False)


def memory(name: str, tokens: int, target: str) -> dict[str, float]:
    """Peak growth of the resident set, in MB, measured in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak, name, tokens, target).result()


def peak(name: str, tokens: int, target: str) -> dict[str, float]:
    """Growth while reconstructing, beside the bound: one forward pass, the streams, one layer's statistics, the pruned copy."""
    model, batches = MODELS[name](tokens)
    mask = half(model, batches)
    forward = _growth(lambda: plain(model, batches))
    grown = _growth(lambda: liar.reconstruct(model, mask, batches, target=target, progress=False))
    layout = liar.discover(model)
    config: Any = model.config
    hidden: int = config.hidden_size
    padded = sum(batch["input_ids"].numel() for batch in batches)
    replayed = sum(mask.kept(site.name) * site.consumer.width for site in layout.sites[:2])
    kept = max(mask.kept(site.name) * site.consumer.width for site in layout.sites)
    parts = {
        "forward": forward,
        # float32: the dense stream; for the sequential target the pruned stream, what the producers of both sites of a block
        # read, and the sums after both sites, of which a pre-norm block hands the last one on as its stream.
        "streams": 4.0 * padded * hidden * (1 if target == "layer_output" else 5 if name == "llama" else 6),
        "replayed parts": 4.0 * padded * replayed * (target == "residual_stream"),
        # float32: rows of every fold that wait to fill a chunk, while they are joined.
        "waiting rows": 4.0 * FOLDS * 2 * CHUNK * (kept + hidden),
        # float64: one accumulator per fold and the three sums of a split.
        "grams": 8.0 * kept * (kept + hidden) * (FOLDS + 3),
        "pruned copy": 4.0 * mask.parameters(layout),
    }
    return {"grown_mb": grown / 1e6, "bound_mb": sum(parts.values()) / 1e6} | {k + "_mb": v / 1e6 for k, v in parts.items()}


def _growth(work: Callable[[], object]) -> float:
    """Bytes by which the resident set exceeds its size of now while `work` runs (Linux resets and keeps the peak)."""
    Path("/proc/self/clear_refs").write_text("5")
    before = psutil.Process().memory_info().rss
    work()
    status = Path("/proc/self/status").read_text()
    peak_kb = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return float(peak_kb) * 1024 - before


def main() -> None:
    """Measure what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32_768)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    table = Table(title="times one plain dense forward pass over the same tokens (median)")
    for heading in HEADINGS:
        table.add_column(heading)
    file = ResultFile(RESULTS / "speed.jsonl")
    for name in MODELS:
        key = {"model": name, "tokens": arguments.tokens}
        for row in rows(file.get_or_run(key, partial(measure, name, arguments.tokens, arguments.rounds))):
            table.add_row(*row)
    Console(width=150).print(table)


def rows(run: Record) -> list[list[str]]:
    """The rows of one run in a table, one per target."""
    lines = []
    for target, ratio in run["ratio_median"].items():
        stages = ", ".join(f"{stage} {value:.2f}" for stage, value in run["stages_median"][target].items())
        used = run["memory"][target]
        peak_of_bound = f"{used['grown_mb']:.0f} MB of {used['bound_mb']:.0f} MB"
        lines.append([run["model"], f"{run['tokens']:,}", target, f"{ratio:.2f}x", stages, peak_of_bound])
    return lines


if __name__ == "__main__":
    main()
