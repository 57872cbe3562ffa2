"""Make the pages that `check.mjs` opens: reports of real runs on tiny models, good news and bad, from 2 to 80 layers."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import torch

import liar
from liar.report import PageSource, write_page
from liar.testing import tiny_batches, tiny_model

# Layers -> how the model is pruned. The one of 6 layers learns a few tokens by heart: a page that has to warn.
RUNS: dict[int, dict[str, Any]] = {2: {"keep": 0.5}, 6: {"keep": 0.9, "ridge": 1e-9}, 30: {"keep": 0.6}, 80: {"keep": 0.7}}


def run(layers: int) -> PageSource:
    """The report of a run."""
    model = tiny_model(
        "llama" if layers == 6 else "bert",
        head="causal-lm" if layers == 6 else "masked-lm",
        num_hidden_layers=layers,
        hidden_size=48,
        num_attention_heads=12,
        num_key_value_heads=12,
        intermediate_size=192,
    )
    batches = tiny_batches(model, batches=2 if layers == 6 else 8)
    options = dict(RUNS[layers])
    mask = liar.select(model, batches, keep=options.pop("keep"), progress=False)
    held_out = None if layers == 30 else tiny_batches(model, seed=1)
    report = liar.reconstruct(model, mask, batches, held_out=held_out, progress=False, **options)
    return PageSource(
        name=f"<tiny> & {layers} layers",
        report=report,
        mask=mask,
        loading='import liar\n\nmodel = liar.load("slim")',
        replaying="liar replay slim/run.json --out again",
        run={"Texts": "texts <1>.txt"},
    )


def main(folder: Path) -> None:
    """Write the pages, and one that compares them all."""
    torch.set_num_threads(1)
    logging.getLogger("liar").setLevel(logging.ERROR)
    folder.mkdir(parents=True, exist_ok=True)
    sources = [run(layers) for layers in RUNS]
    for layers, source in zip(RUNS, sources, strict=True):
        write_page([source], folder / f"{layers}-layers.html")
    write_page(sources, folder / "comparison.html")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
