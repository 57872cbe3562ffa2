"""Repair of a model that was cut elsewhere, against one whose mask is known; and pruning in one step, two and three.

    python -m benchmarks.steps --scale minilm --data-dir DATA
    python -m benchmarks.steps --scale stories260K --model STORIES260K --data-dir DATA

Every run is a line in results/steps.jsonl; runs that are there are skipped.
"""

from __future__ import annotations

import argparse
import copy
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from math import inf
from pathlib import Path
from typing import Any

import pandas
from torch import nn

import liar
from benchmarks.refinement import Scale, Study
from benchmarks.results import RESULTS, Record, ResultFile, read_records
from benchmarks.selections import SELECTIONS
from benchmarks.summary import lined

FILE = RESULTS / "steps.jsonl"
SCALES = {
    "stories260K": Scale("tinystories", length=256, tokens=8_192, evaluated=8_192, seeds=(0, 1, 2)),
    "minilm": Scale("stsb", length=128, tokens=8_000, evaluated=4_000, seeds=(0,)),
}
KEEPS = (0.5, 0.3, 0.2)
SCORES = {"stories260K": "perplexity_tinystories", "minilm": "spearman"}


def known(model: nn.Module, mask: liar.Mask, calibration: Sequence[Any], _: float) -> None:
    """With the mask, from the whole model."""
    liar.reconstruct(model, mask, calibration, progress=False)


def elsewhere(model: nn.Module, mask: liar.Mask, calibration: Sequence[Any], _: float) -> None:
    """From what another tool leaves: the removed weights are gone, the dense model is the teacher."""
    teacher = copy.deepcopy(model)
    liar.remove(model, mask)
    liar.reconstruct(model, None, calibration, teacher=teacher, progress=False)


def stepped(model: nn.Module, _: liar.Mask, calibration: Sequence[Any], keep: float, *, steps: int) -> None:
    """Pruned and repaired so many times."""
    liar.prune(model, calibration, keep=keep, steps=steps, progress=False)


WAYS: dict[str, Callable[..., None]] = {
    "1 step": known,
    "1 step, cut elsewhere": elsewhere,
    "2 steps": partial(stepped, steps=2),
    "3 steps": partial(stepped, steps=3),
}


def measure(study: Study, way: str, keep: float, seed: int) -> Record:
    """Prune and repair in one way, and score."""
    model, calibration = copy.deepcopy(study.dense), study.calibration(seed)
    mask = SELECTIONS["reconstruction"](study.dense, calibration, keep, seed)
    began = time.perf_counter()
    WAYS[way](model, mask, calibration, keep)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, **study.errors(model, calibration), **study.scores(model)}


def table() -> str:
    """A row per model, share and way: error on unseen texts and the task's score, means over the samples of texts."""
    records = read_records(FILE)
    rows = []
    if records:
        for (model, keep), block in pandas.DataFrame(records).groupby(["model", "keep"], sort=False):
            for way in [name for name in WAYS if name in set(block["way"])]:
                group = block[block["way"] == way]
                error, score = group["unseen_error"].mean(), group[SCORES[str(model)]].mean()
                numbers = [f"{error:.4f}", f"{score:.3f}", f"{group['seconds'].median():.0f}"]
                rows.append([str(model), f"{keep:.0%}", way, str(len(group)), *numbers])
    return lined(["model", "kept", "way", "samples", "error on unseen texts", "perplexity or Spearman", "seconds"], rows)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=list(SCALES), required=True)
    parser.add_argument("--model", help="folder of the model; all-MiniLM-L6-v2 if left out (scale minilm)")
    parser.add_argument("--data-dir", type=Path, help="folder of the data; the Hugging Face hub if left out")
    parser.add_argument("--hours", type=float, default=inf, help="begin no run after so many hours; call again to go on")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    scale, file = SCALES[arguments.scale], ResultFile(FILE)
    study, until = Study(arguments.model, arguments.data_dir, scale), time.monotonic() + 3600 * arguments.hours
    for seed, keep, way in product(scale.seeds, KEEPS, WAYS):
        key = {"model": arguments.scale, "tokens": scale.tokens, "seed": seed, "keep": keep, "way": way}
        if time.monotonic() < until or file.find(**key):
            file.get_or_run(key, partial(measure, study, way, keep, seed))


if __name__ == "__main__":
    main()
