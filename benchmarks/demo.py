"""The main job on a real model, offline: half of all-MiniLM-L6-v2's encoder removed, calibrated and measured on real text.

    python -m benchmarks.demo --out demo-output [--keep 0.5]

Calibration: paragraphs of one part of `pydoc_data.topics` (Python's own language reference). Measured on the other part:
cosine of each paragraph's embedding with the dense model's, and how often both models name the same nearest neighbour.
"""

from __future__ import annotations

import argparse
import copy
import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import liar
from benchmarks.tasks import embed, load_encoder


def paragraphs() -> tuple[list[str], list[str]]:
    """(calibration, held-out) paragraphs; whole topics go to one side, so no text is on both."""
    parts: tuple[list[str], list[str]] = ([], [])
    for number, name in enumerate(sorted(topics)):
        for paragraph in topics[name].split("\n\n"):
            words = " ".join(paragraph.split())
            if len(words) > 80:
                parts[number % 3 == 0].append(words)
    held_out = [text for text in dict.fromkeys(parts[1]) if text not in set(parts[0])]
    return list(dict.fromkeys(parts[0])), held_out


def same_neighbour(dense: Tensor, other: Tensor) -> float:
    """Share of the texts whose nearest other text is the same in both embeddings."""
    nearest = [(e @ e.T).fill_diagonal_(-1).argmax(1) for e in (dense, other)]
    return float((nearest[0] == nearest[1]).float().mean())


def latencies(models: Sequence[nn.Module], batch: dict[str, Tensor], rounds: int = 15) -> list[float]:
    """Median seconds of one forward pass per model, the models taking turns so that a busy machine hits all alike."""
    seconds: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for _ in range(rounds + 2):
            for model, times in zip(models, seconds, strict=True):
                began = time.perf_counter()
                model(**batch)
                times.append(time.perf_counter() - began)
    return [median(times[2:]) for times in seconds]


def size(folder: Path) -> int:
    """Bytes of the weights on disk."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def main() -> None:
    """Prune, measure, save, show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--tokens", type=int, default=24_000)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    dense, tokenizer = load_encoder(None)
    calibration_texts, held_out = paragraphs()
    calib = liar.calibration(calibration_texts, tokenizer, tokens=arguments.tokens)

    mask = liar.select(dense, calib, keep=arguments.keep)
    masked, repaired = copy.deepcopy(dense), copy.deepcopy(dense)
    liar.remove(masked, mask)
    report = liar.reconstruct(repaired, mask, calib)

    if arguments.out.exists():
        shutil.rmtree(arguments.out)
    liar.save(dense, arguments.out / "dense", tokenizer=tokenizer)
    liar.save(repaired, arguments.out / "smaller", tokenizer=tokenizer, mask=mask, report=report)
    loaded = liar.load(arguments.out / "smaller")
    report.save(arguments.out / "report.json")
    liar.plot(report, arguments.out / "report.png")
    show(dense, masked, loaded, tokenizer, held_out, arguments.out, report)


def show(
    dense: nn.Module, masked: nn.Module, loaded: nn.Module, tokenizer: Any, texts: list[str], out: Path, report: liar.Report
) -> None:
    """Measure on held-out text and print the tables."""
    models = {"dense": dense, "pruned, nothing repaired": masked, "reconstructed": loaded}
    embeddings = {name: embed(model, tokenizer, texts) for name, model in models.items()}
    batch = dict(tokenizer(texts[:32], padding=True, truncation=True, max_length=128, return_tensors="pt"))
    seconds = latencies(list(models.values()), batch)
    sizes = {"dense": size(out / "dense"), "reconstructed": size(out / "smaller")}
    table = Table(title=f"all-MiniLM-L6-v2 on {len(texts)} held-out paragraphs")
    for heading in ("", "cosine to dense", "same neighbour", "encoder parameters", "file", "latency"):
        table.add_column(heading, justify="right" if heading else "left")
    for (name, model), latency in zip(models.items(), seconds, strict=True):
        cosine = float((embeddings["dense"] * embeddings[name]).sum(1).mean())
        table.add_row(
            name,
            f"{cosine:.3f}",
            f"{same_neighbour(embeddings['dense'], embeddings[name]):.1%}",
            f"{liar.discover(model).parameters / 1e6:.2f} M",
            f"{sizes[name] / 1e6:.1f} MB" if name in sizes else "",
            f"{latency * 1e3:.0f} ms ({seconds[0] / latency:.2f}x)",
        )
    console = Console(width=128)
    console.print(report.table())
    console.print(table)
    console.print(f"Saved: {out / 'smaller'} (the model), {out / 'report.png'} (the picture), {out / 'report.json'}")


if __name__ == "__main__":
    main()
