"""Where gradient reconstruction starts: from the mask alone, or from the closed form; and what it adds to the closed form.

    python -m benchmarks.starts --scale minilm --data-dir DATA
    python -m benchmarks.starts --scale stories260K --model STORIES260K --data-dir DATA

Both starts are trained for several numbers of epochs with the options of the library's default, the best weights on held-out
sequences kept. Every run is a line in results/starts.jsonl; runs that are there are skipped.
"""

from __future__ import annotations

from itertools import product

import numpy
import pandas

from benchmarks.refinement import Run, Scale, command
from benchmarks.results import RESULTS, read_records
from benchmarks.summary import lined

FILE = RESULTS / "starts.jsonl"
SCALES = {
    "stories260K": Scale("tinystories", length=256, tokens=8_192, evaluated=8_192, seeds=(0,)),
    "minilm": Scale("stsb", length=128, tokens=2_000, evaluated=2_000, seeds=(0,)),
    "smollm2": Scale("wikitext-512-first-16384", length=128, tokens=2_048, evaluated=2_048, seeds=(0,)),
}
KEEPS = {"stories260K": (0.8, 0.5, 0.3), "minilm": (0.5, 0.3), "smollm2": (0.5, 0.3)}
EPOCHS = {"stories260K": (0, 1, 3, 10), "minilm": (0, 1, 3, 10), "smollm2": (0, 1, 3)}
RATES = {"stories260K": 1e-3, "minilm": 2e-4, "smollm2": 2e-4}
STARTS = ("mask", "closed form")
# What a task is about.
SCORES = {"stories260K": "perplexity_tinystories", "minilm": "spearman", "smollm2": "perplexity_wikitext"}


def plan(scale: str) -> list[Run]:
    """The runs on one model."""
    return [
        Run(
            "units",
            "reconstruction",
            keep,
            start,
            granularity="sublayer" if epochs else None,
            epochs=max(1, epochs),
            learning_rate=RATES[scale],
            select=True,
        )
        for keep, epochs, start in product(KEEPS[scale], EPOCHS[scale], STARTS)
    ]


def table() -> str:
    """A row per model, share and start: error on unseen texts and the score by epochs, seconds of the longest training."""
    records = read_records(FILE)
    rows = []
    if records:
        frame = pandas.DataFrame(records)
        frame["passes"] = frame["epochs"].where(frame["granularity"].notna(), 0)
        for (model, keep, start), group in frame.groupby(["model", "keep", "start"], sort=False):
            group = group.sort_values("passes")
            errors = ", ".join(f"{row.passes}: {row.unseen_error:.4f}" for row in group.itertuples())
            scores = ", ".join(f"{each['passes']}: {each[SCORES[str(model)]]:.3f}" for _, each in group.iterrows())
            rows.append([str(model), f"{keep:.0%}", str(start), errors, scores, f"{group['seconds'].max():.0f}"])
    return lined(["model", "kept", "start", "error on unseen texts by epochs", "score by epochs", "seconds, at most"], rows)


def saved() -> str:
    """Epochs from the closed form to the error that the mask alone reaches after each number of epochs; interpolated."""
    records = read_records(FILE)
    rows = []
    if records:
        frame = pandas.DataFrame(records)
        frame["passes"] = frame["epochs"].where(frame["granularity"].notna(), 0)
        for (model, keep), group in frame.groupby(["model", "keep"], sort=False):
            curves = {
                start: part.sort_values("passes")[["passes", "unseen_error"]].to_numpy(float)
                for start, part in group.groupby("start")
            }
            if set(curves) == set(STARTS):
                passes, error = curves["mask"][-1]
                needed = epochs_to(curves["closed form"], error)
                shown = f"{needed:.1f}" if numpy.isfinite(needed) else "not reached"
                rows.append([str(model), f"{keep:.0%}", f"{error:.4f}", f"{passes:.0f}", shown])
    return lined(["model", "kept", "error", "epochs from the mask", "epochs from the closed form"], rows)


def epochs_to(curve: numpy.ndarray, error: float) -> float:
    """After how many epochs a curve (epochs, error) first is at an error, linearly between points; infinite if never."""
    for (before, high), (after, low) in zip([(0.0, numpy.inf), *curve[:-1].tolist()], curve.tolist(), strict=True):
        if low <= error:
            return float(after if not numpy.isfinite(high) else before + (after - before) * (high - error) / (high - low))
    return float("inf")


def main() -> None:
    """Run what is missing."""
    command(__doc__, "starts", SCALES, {name: plan(name) for name in SCALES})


if __name__ == "__main__":
    main()
