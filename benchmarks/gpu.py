"""A model of the shape of LLaMA-7B on a GPU: how long `reconstruct` and `prune` take, and whether the CPU agrees.

    python -m benchmarks.gpu [--keep 0.8 0.5] [--sequences 128] [--length 2048] [--layers 32] [--width 4096]

Random weights in bfloat16, random tokens. The large model is timed, each verb on weights that are made anew. A small one in
float32 is pruned on the GPU and on the CPU with the same mask: their outputs have to agree. With `--device cpu` and small sizes
it runs anywhere, as a test does. Runs that are in results/gpu.jsonl are skipped.
"""

from __future__ import annotations

import argparse
import logging
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import liar
from benchmarks.results import RESULTS, ResultFile

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


def measure(keep: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a plain pass, of `reconstruct` and of `prune`, by stage, and the peak of the device's memory."""
    device = arguments.device
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = llama(arguments.width, arguments.layers, dtype, device)
    batches = batches_of(model, arguments.sequences, arguments.length)
    with torch.no_grad():
        model(batches[0].to(device))
        began = waited(device)
        for batch in batches:
            model(batch.to(device), logits_to_keep=1)
        plain = waited(device) - began
    began = waited(device)
    report = liar.prune(model, batches, keep=keep)
    prune = waited(device) - began
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
    del model
    model = llama(arguments.width, arguments.layers, dtype, device)
    mask = liar.select(model, batches, keep=keep, criterion="magnitude", progress=False)
    began = waited(device)
    liar.reconstruct(model, mask, batches)
    reconstruct = waited(device) - began
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "plain_seconds": plain,
        "prune_seconds": prune,
        "reconstruct_seconds": reconstruct,
        "stages": dict(report.seconds),
        "peak_gb": peak,
        "agreement": agreement(device),
    }


def parsed(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.5])
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
    for keep in arguments.keep:
        key = {name: getattr(arguments, name) for name in ("sequences", "length", "layers", "width")} | {"keep": keep}
        run = file.get_or_run(key, partial(measure, keep, arguments))
        logging.getLogger(__name__).warning(
            "%s, keep %.2f: plain %.1f s, reconstruct %.1f s, prune %.1f s, agreement with the CPU %.1e (at most %.0e)",
            run["device"],
            keep,
            *(run[f"{verb}_seconds"] for verb in ("plain", "reconstruct", "prune")),
            run["agreement"],
            AGREE,
        )


if __name__ == "__main__":
    main()
