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
from collections.abc import Callable
from functools import cache, partial
from itertools import product
from math import inf
from pathlib import Path

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
    "minilm": Scale("stsb", length=128, tokens=4_000, evaluated=2_000, seeds=(0,)),
}
KEEPS = (0.5, 0.3, 0.2)
SCORES = {"stories260K": "perplexity_tinystories", "minilm": "spearman"}


def known(study: Study, model: nn.Module, keep: float, seed: int) -> None:
    """With the mask, from the whole model."""
    liar.reconstruct(model, masked(study, keep, seed), study.calibration(seed), progress=False)


def elsewhere(study: Study, model: nn.Module, keep: float, seed: int) -> None:
    """From what another tool leaves: the removed weights are gone, the dense model is the teacher."""
    liar.remove(model, masked(study, keep, seed))
    liar.reconstruct(model, None, study.calibration(seed), teacher=study.dense, progress=False)


def stepped(study: Study, model: nn.Module, keep: float, seed: int, *, steps: int) -> None:
    """Pruned and repaired so many times."""
    liar.prune(model, study.calibration(seed), keep=keep, steps=steps, progress=False)


@cache
def masked(study: Study, keep: float, seed: int) -> liar.Mask:
    """The mask of the default criterion."""
    return SELECTIONS["reconstruction"](study.dense, study.calibration(seed), keep, seed)


WAYS: dict[str, Callable[..., None]] = {
    "1 step": known,
    "1 step, cut elsewhere": elsewhere,
    "2 steps": partial(stepped, steps=2),
    "3 steps": partial(stepped, steps=3),
}


def measure(study: Study, way: str, keep: float, seed: int) -> Record:
    """Prune and repair in one way, and score. Seconds are those of the repair; for several steps, of the selections too."""
    model = copy.deepcopy(study.dense)
    if way.startswith("1"):
        masked(study, keep, seed)
    began = time.perf_counter()
    WAYS[way](study, model, keep, seed)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, **study.errors(model, study.calibration(seed)), **study.scores(model)}


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
