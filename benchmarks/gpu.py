"""A model of the shape of LLaMA-7B on a GPU: how long `reconstruct` and `prune` take, and whether the CPU agrees.

    python -m benchmarks.gpu [--keep 0.5] [--ways device host] [--sequences 128] [--length 2048] [--layers 32] [--width 4096]

Random weights in bfloat16, random tokens. The large model is timed with everything on the device ("device"), and with weights
and activations on the host ("host"), each verb on weights that are made anew; the peak of the device's memory and the kernels
that take most time stand beside it. A small one in float32 is pruned on the GPU and on the CPU with the same mask: their
outputs have to agree. With `--device cpu` and small sizes it runs anywhere, as a test does. Runs that are in
results/gpu.jsonl are skipped.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import accelerate
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

import liar
from benchmarks.results import RESULTS, ResultFile

# Where activations are, and whether the weights are on the host, with one block at a time on the device.
WAYS: dict[str, dict[str, Any]] = {
    "device": {"activations": "device", "offloaded": False},
    "host": {"activations": "host", "offloaded": True},
}
# Relative difference of outputs that float32 sums in another order may leave.
AGREE = 1e-2


def llama(width: int, layers: int, dtype: torch.dtype, device: str) -> nn.Module:
    """A random LLaMA; 4,096 wide and 32 layers deep it has the shape of LLaMA-7B."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000 if width >= 1024 else 256,
        hidden_size=width,
        intermediate_size=int(width * 2.6875),
        num_hidden_layers=layers,
        num_attention_heads=max(width // 128, 2),
        num_key_value_heads=max(width // 128, 2),
        max_position_embeddings=4096,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.train(False)
    return model


def batches_of(model: nn.Module, sequences: int, length: int) -> list[Tensor]:
    """Random tokens, a sequence at a time."""
    generator = torch.Generator().manual_seed(1)
    vocabulary: Any = model.config.vocab_size  # type: ignore[union-attr]
    return [torch.randint(vocabulary, (1, length), generator=generator) for _ in range(sequences)]


def agreement(device: str) -> float:
    """Relative difference of the outputs of a small model pruned on the device and on the CPU, with one mask."""
    outputs = []
    dense = llama(128, 2, torch.float32, "cpu")
    batches = batches_of(dense, 16, 64)
    mask = liar.select(dense, batches, keep=0.6, progress=False)
    for place in (device, "cpu"):
        model = llama(128, 2, torch.float32, "cpu").to(place)
        liar.reconstruct(model, mask, batches, progress=False)
        with torch.no_grad():
            outputs.append(model(batches[0].to(place)).logits.double().cpu())
    return float((outputs[0] - outputs[1]).norm() / outputs[1].norm())


def waited(device: str) -> float:
    """Now, once the device has done all it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def new_llama(way: str, width: int, layers: int, dtype: torch.dtype, device: str) -> Any:
    """A model on the device, or with its weights on the host, a block at a time on the device."""
    if not WAYS[way]["offloaded"]:
        return llama(width, layers, dtype, device)
    return accelerate.cpu_offload(llama(width, layers, dtype, "cpu"), execution_device=torch.device(device))


def timed(work: Callable[[], Any], device: str) -> tuple[float, float | None, Any]:
    """Seconds, the peak of the device's memory in GiB (None on a CPU), and what came of it."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = waited(device)
    result = work()
    seconds = waited(device) - began
    return seconds, torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None, result


def largest_kernels(work: Callable[[], Any], device: str) -> list[str]:
    """The names of what takes most time on the device, the longest first."""
    kind = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[kind]) as found:
        work()
    times = {
        each.key: each.self_device_time_total if device == "cuda" else each.self_cpu_time_total for each in found.key_averages()
    }
    return sorted(times, key=times.__getitem__, reverse=True)[:5]


def measure(keep: float, way: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peaks of memory of a plain pass, of `reconstruct` and of `prune`, by stage."""
    device = arguments.device
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    new_model = partial(new_llama, way, arguments.width, arguments.layers, dtype, device)
    model = new_model()
    batches = batches_of(model, arguments.sequences, arguments.length)
    options = {"activations": WAYS[way]["activations"]}

    def plain() -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch.to(device), logits_to_keep=1)

    plain()
    plain_seconds, _, _ = timed(plain, device)
    prune_seconds, prune_peak, report = timed(lambda: liar.prune(model, batches, keep=keep, **options), device)
    model = new_model()
    mask = liar.select(model, batches, keep=keep, criterion="magnitude", progress=False)
    seconds, peak, _ = timed(lambda: liar.reconstruct(model, mask, batches, **options), device)
    model = new_model()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "plain_seconds": plain_seconds,
        "prune_seconds": prune_seconds,
        "prune_peak_gib": prune_peak,
        "reconstruct_seconds": seconds,
        "reconstruct_peak_gib": peak,
        "stages": dict(report.seconds),
        "largest_kernels": largest_kernels(lambda: liar.reconstruct(model, mask, batches[:8], **options), device),
        "agreement": agreement(device),
    }


def parsed(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5])
    parser.add_argument("--ways", choices=list(WAYS), nargs="+", default=list(WAYS))
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    return parser.parse_args(given)


def main() -> None:
    """Measure what is missing and print it."""
    arguments = parsed()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    file = ResultFile(RESULTS / "gpu.jsonl")
    for keep, way in product(arguments.keep, arguments.ways):
        key = {name: getattr(arguments, name) for name in ("sequences", "length", "layers", "width")} | {
            "keep": keep,
            "way": way,
        }
        run = file.get_or_run(key, partial(measure, keep, way, arguments))
        logging.getLogger(__name__).warning(
            "%s, keep %.2f, %s: plain %.1f s, reconstruct %.1f s (%s GiB), prune %.1f s (%s GiB), agreement with the CPU %.1e "
            "(at most %.0e); most time in %s",
            run["device"], keep, way, run["plain_seconds"], run["reconstruct_seconds"], run["reconstruct_peak_gib"],
            run["prune_seconds"], run["prune_peak_gib"], run["agreement"], AGREE, ", ".join(run["largest_kernels"]),
        )  # fmt: skip


if __name__ == "__main__":
    main()
