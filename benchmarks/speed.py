"""What pruning costs, as a ratio to one plain dense forward pass over the same calibration tokens.

    python -m benchmarks.speed [--models llama minilm] [--rounds 5] [--tokens 32768]
    python -m benchmarks.speed --models smollm2 --model FOLDER --rounds 3 --tokens 8192

A random LLaMA (4 layers, hidden 512, feed-forward 1376, 8 query and 4 key/value heads) on random tokens, all-MiniLM-L6-v2 on
the paragraphs of `pydoc_data.topics`, and SmolLM2-135M on the same text. `reconstruct` gets a mask with equally many units per
layer, `prune` selects its own. In every round the plain pass and each verb take turns; ratios are taken within a round, and the
median over the rounds counts. Beside the parts of a selection stands the time they would take at the machine's measured rate of
matrix products. With its activations on disk, `reconstruct` stands beside itself (on a CPU the host's memory is where they are
computed). Peak memory of a reconstruction is the growth of the resident set in a process of its own, beside the bound it
should stay under.
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
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaModel

import liar
from benchmarks.demo import paragraphs
from benchmarks.results import RESULTS, Record, ResultFile
from benchmarks.tasks import load_encoder
from liar.data import FOLDS, sample
from liar.selection.error_curves import ROWS, TOKENS
from liar.selection.fisher import sampled
from liar.statistics.chunks import CHUNK

KEEP = {"llama": 0.5, "minilm": 0.5, "smollm2": 0.8}
TARGETS = ("layer_output", "residual_stream", "damped_stream")
HEADINGS = ("model", "tokens", "what", "time", "where it goes", "peak memory of bound")
PARTS = ("model, tokens", "part of `select`", "dense passes", "G operations", "at the machine's rate")
SIZE = 2048

Loaded = tuple[nn.Module, list[dict[str, Tensor]]]


def random_llama(
    tokens: int, _: Path | None = None, *, width: int = 512, feed_forward: int = 1376, layers: int = 4, groups: int = 2
) -> Loaded:
    """A random model with heads of 64 channels, so many to a key, and random sequences of 256 tokens in batches of 8."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64 // groups,
    )
    model = LlamaModel(config)
    model.train(False)
    return model, [{"input_ids": torch.randint(0, 1000, (8, 256))} for _ in range(tokens // 2048)]


def minilm(tokens: int, _: Path | None = None) -> Loaded:
    """The real encoder on real text."""
    model, tokenizer = load_encoder(None)
    return model, liar.calibration([text for part in paragraphs() for text in part], tokenizer, tokens=tokens, max_length=128)


def smollm2(tokens: int, folder: Path | None) -> Loaded:
    """A real LLaMA with its head on real text, in full sequences of 512 tokens."""
    assert folder is not None
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = [text for part in paragraphs() for text in part]
    return model, liar.calibration(texts, tokenizer, tokens=tokens, max_length=512, batch_size=4, pack=True)


MODELS: dict[str, Callable[[int, Path | None], Loaded]] = {"llama": random_llama, "minilm": minilm, "smollm2": smollm2}


@torch.inference_mode()
def plain(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> None:
    """One dense forward pass over all batches."""
    for batch in batches:
        model(**batch)


def measure(name: str, tokens: int, rounds: int, folder: Path | None) -> dict[str, Any]:
    """Ratios and the breakdown of one model."""
    model, batches = MODELS[name](tokens, folder)
    keep = KEEP[name]
    mask = half(model, batches, keep)
    plain(model, batches)
    work: dict[str, Callable[[nn.Module], liar.Report]] = {
        target: partial(liar.reconstruct, mask=mask, calib=batches, target=target, progress=False) for target in TARGETS
    }
    on_disk = partial(liar.reconstruct, mask=mask, calib=batches, activations="disk", progress=False)
    work["damped_stream, activations on disk"] = on_disk
    work["prune"] = partial(liar.prune, calib=batches, keep=keep, progress=False)
    if name == "smollm2":
        del work["layer_output"]
    ratios: dict[str, list[float]] = {verb: [] for verb in work}
    stages: dict[str, list[dict[str, float]]] = {verb: [] for verb in work}
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        plain(model, batches)
        seconds.append(time.perf_counter() - began)
        for verb, do in work.items():
            changed = copy.deepcopy(model)
            began = time.perf_counter()
            report = do(changed)
            ratios[verb].append((time.perf_counter() - began) / seconds[-1])
            parts = {stage: value / seconds[-1] for stage, value in report.seconds.items()}
            stages[verb].append(parts | {"rest": ratios[verb][-1] - sum(parts.values())})
    return {
        "keep": keep,
        "rounds": rounds,
        "plain_seconds_median": median(seconds),
        "ratio_median": {verb: median(values) for verb, values in ratios.items()},
        "ratios": ratios,
        "stages_median": {
            verb: {stage: median(each[stage] for each in parts) for stage in parts[0]} for verb, parts in stages.items()
        },
        "operations": operations(model, batches),
        "rates": {str(dtype).removeprefix("torch."): rate(dtype) for dtype in (torch.float32, torch.float64)},
        "memory": {target: memory(name, tokens, target, folder) for target in TARGETS} if name != "smollm2" else {},
    }


def rate(dtype: torch.dtype) -> float:
    """Operations of a product of two square matrices per second."""
    a = torch.randn(SIZE, SIZE, dtype=dtype)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        _ = a @ a
        times.append(time.perf_counter() - began)
    return 2 * SIZE**3 / median(times)


def operations(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    """What the parts of a default selection compute, in floating-point operations by their type."""
    with FlopCounterMode(display=False) as counter:
        plain(model, batches[:1])
    calibration = liar.Calibration.of(batches, model)
    per_token = counter.get_total_flops() / int(calibration.token_masks[0].sum())
    layout = liar.discover(model)
    widths = [(site.units * site.consumer.width, site.out) for site in layout.sites]
    drawn = sampled(model, calibration)[0].tokens
    rows = sample(calibration, max(TOKENS, ROWS * max(width for width, _ in widths))).tokens
    return {
        "select: forward": {"float32": per_token * drawn},
        "select: backward": {"float32": per_token * drawn},
        "select: sums of gradients": {"float32": sum(2 * drawn * out**2 for _, out in widths)},
        "select: dense forward": {"float32": per_token * rows},
        "select: statistics": {"float32": sum(rows * width * (width + 1) for width, _ in widths)},
        # The inverse; three updates of half the sum of squares; the weights in the directions that count, and their products.
        "select: elimination": {"float64": sum(3 * width**3 + 2 * width * out * (width + out) for width, out in widths)},
    }


def half(model: nn.Module, batches: Sequence[dict[str, Tensor]], keep: float) -> liar.Mask:
    """A share of the parameters, equally many units per layer."""
    return liar.select(model, batches, keep=keep, criterion="fluctuation", widths="balanced", progress=False)


def memory(name: str, tokens: int, target: str, folder: Path | None) -> dict[str, float]:
    """Peak growth of the resident set, in MB, measured in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak, name, tokens, target, folder).result()


def peak(name: str, tokens: int, target: str, folder: Path | None) -> dict[str, float]:
    """Growth while reconstructing, beside the bound: one forward pass, the streams, one layer's statistics, the pruned copy."""
    model, batches = MODELS[name](tokens, folder)
    mask = half(model, batches, KEEP[name])
    forward = growth_of_memory(lambda: plain(model, batches))
    grown = growth_of_memory(lambda: liar.reconstruct(model, mask, batches, target=target, progress=False))
    layout = liar.discover(model)
    config: Any = model.config
    hidden: int = config.hidden_size
    padded = sum(batch["input_ids"].numel() for batch in batches)
    # Of the attention part, what it gives; of the feed-forward part, what its consumer reads.
    replayed = hidden + mask.kept("neurons.0")
    # `layer_output` has the statistics of both sites of a block at once.
    widths = sorted(mask.kept(site.name) * site.consumer.width for site in layout.sites[:2])
    widths = widths if target == "layer_output" else widths[-1:]
    sequential, damped = target != "layer_output", target == "damped_stream"
    # The damped target has two parts.
    columns = hidden * (2 if damped else 1)
    parts = {
        "forward": forward,
        # float32: the dense stream; for the sequential targets the pruned stream, what the producers of both sites of a block
        # read, and the sums after both sites, of which a pre-norm block hands the last one on as its stream; for the damped one
        # what attention gives, too.
        "streams": 4.0 * padded * hidden * ((5 if name == "llama" else 6) + damped if sequential else 1),
        "replayed parts": 4.0 * padded * replayed * sequential,
        # float32: the chunks of every fold that are being filled.
        "waiting rows": 4.0 * FOLDS * CHUNK * sum(kept + columns for kept in widths),
        # float64: one accumulator per fold and the three sums of a split.
        "grams": 8.0 * sum(kept * (kept + columns) for kept in widths) * (FOLDS + 3),
        "pruned copy": 4.0 * mask.parameters(layout),
    }
    return {"grown_mb": grown / 1e6, "bound_mb": sum(parts.values()) / 1e6} | {k + "_mb": v / 1e6 for k, v in parts.items()}


def growth_of_memory(work: Callable[[], object]) -> float:
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
    parser.add_argument("--models", choices=list(MODELS), nargs="+", default=["llama", "minilm"])
    parser.add_argument("--model", type=Path, help="folder of SmolLM2-135M")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32_768)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if "smollm2" in arguments.models and arguments.model is None:
        parser.error("--models smollm2 needs --model FOLDER")
    tables = [Table(*HEADINGS, title="times one plain dense forward pass over the same tokens (median)"), Table(*PARTS)]
    file = ResultFile(RESULTS / "speed.jsonl")
    for name in arguments.models:
        key = {"model": name, "tokens": arguments.tokens}
        run = file.get_or_run(key, partial(measure, name, arguments.tokens, arguments.rounds, arguments.model))
        for table, lines in zip(tables, (rows(run), parts_of_select(run)), strict=True):
            for line in lines:
                table.add_row(*line)
    for table in tables:
        Console(width=180).print(table)


def rows(run: Record) -> list[list[str]]:
    """The rows of one run in a table, one per verb."""
    lines = []
    for verb, ratio in run["ratio_median"].items():
        stages = ", ".join(f"{stage} {value:.2f}" for stage, value in run["stages_median"][verb].items())
        used = run["memory"].get(verb)
        peak_of_bound = f"{used['grown_mb']:.0f} MB of {used['bound_mb']:.0f} MB" if used else ""
        what = verb if verb == "prune" else f"reconstruct, {verb}"
        lines.append([run["model"], f"{run['tokens']:,}", what, f"{ratio:.2f}x", stages, peak_of_bound])
    return lines


def parts_of_select(run: Record) -> list[list[str]]:
    """The parts of a selection in a table: their time, their operations, and the time of these at the machine's rate."""
    lines = []
    for part, counts in run["operations"].items():
        if (share := run["stages_median"]["prune"].get(part)) is None:
            continue
        seconds = sum(count / run["rates"][dtype] for dtype, count in counts.items())
        numbers = [f"{share:.2f}", f"{sum(counts.values()) / 1e9:,.0f}", f"{seconds / run['plain_seconds_median']:.2f}"]
        lines.append([f"{run['model']}, {run['tokens']:,}", part.removeprefix("select: "), *numbers])
    return lines


if __name__ == "__main__":
    main()
