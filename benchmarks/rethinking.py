"""*Rethinking Pruning LLMs* (Shin et al. 2024) once more: does more reconstruction overfit, and do self-generated texts help?

    python -m benchmarks.rethinking --scale stories260K --model STORIES260K --data-dir DATA
    python -m benchmarks.rethinking --scale smollm2 --model SMOLLM2 --data-dir DATA --hours 1

Half of the weights are removed by Wanda. LR fits every matrix by itself, BR every block, GP takes the targets from the dense
model's own pass, CR trains windows of two blocks. The last weights are kept, as in the study: nothing is held out. Every run is
a line in results/rethinking.jsonl; runs that are there are skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas
from matplotlib.figure import Figure

from benchmarks.refinement import Run, Scale, command
from benchmarks.results import RESULTS, read_records
from benchmarks.summary import lined, spread

FILE = RESULTS / "rethinking.jsonl"
SCALES = {
    "stories260K": Scale("tinystories", length=256, tokens=4_096, evaluated=8_192, seeds=(0, 1, 2)),
    # A few blocks, so that three samples of texts are done in hours on a CPU.
    "smollm2": Scale("wikitext-512-first-16384", length=128, tokens=2_048, evaluated=2_048, seeds=(0, 1, 2), blocks=8),
}
PRUNED = Run("weights", "wanda", 0.5)
# Name in the study -> granularity and propagation.
METHODS: dict[str, dict[str, int | str | None]] = {
    "mask only": {"granularity": None},
    "LR": {"granularity": "matrix", "propagation": "pruned"},
    "BR": {"granularity": "block", "propagation": "pruned"},
    "BR+GP": {"granularity": "block", "propagation": "global"},
    "BR+GP+CR": {"granularity": 2, "propagation": "global"},
}
# As in the study where time allows: 10 epochs, 8 sequences a step, at most 2e-4. A model of 260,000 parameters learns little at
# that rate in so few steps.
TRAINING: dict[str, dict[str, float]] = {
    "stories260K": {"epochs": 10, "sequences": 4, "learning_rate": 1e-3},
    "smollm2": {"epochs": 3, "sequences": 4, "learning_rate": 2e-4},
}
# The last is a control: self-generated texts are more texts, too.
TEXTS = ("own", "own + self", "own + own")


def plan(scale: str) -> list[Run]:
    """The runs on one model, the most telling ones first."""
    base = replace(PRUNED, **TRAINING[scale])  # type: ignore[arg-type]
    runs = [replace(base, **options, texts=texts) for texts in TEXTS for options in METHODS.values()]  # type: ignore[arg-type]
    # What is trained on does not matter where nothing is.
    return [run for run in runs if run.granularity is not None or run.texts == TEXTS[0]]


NUMBERS = {
    "calibration_error": "error on calibration texts",
    "unseen_error": "error on other texts",
    "perplexity_tinystories": "perplexity on stories",
    "perplexity_wikitext": "perplexity on WikiText",
}


def method_of(record: dict[str, object]) -> str:
    """The study's name of what a run does."""
    return next(name for name, options in METHODS.items() if all(record[key] == value for key, value in options.items()))


def model_of(record: dict[str, object]) -> str:
    """The model's name, with how much of it is pruned."""
    return f"{record['model']}, first {record['blocks']} blocks" if "blocks" in record else str(record["model"])


def frame() -> pandas.DataFrame:
    """The runs, with the study's names."""
    records = read_records(FILE)
    return pandas.DataFrame([{**record, "method": method_of(record), "model": model_of(record)} for record in records])


def table() -> str:
    """A row per model, texts and method: means ± standard errors over the samples of texts."""
    runs = frame()
    rows = []
    if len(runs):
        order = list(METHODS)
        for (model, texts), part in runs.groupby(["model", "texts"], sort=False):
            for method in sorted(part["method"].unique(), key=order.index):
                group = part[part["method"] == method]
                numbers = [
                    spread(group[name].mean(), group[name].sem(), ".4f" if "error" in name else ".2f") for name in NUMBERS
                ]
                rows.append([str(model), str(texts), method, str(len(group)), *numbers, f"{group['seconds'].median():.0f}"])
    return lined(["model", "trained on", "method", "samples", *NUMBERS.values(), "seconds"], rows)


def draw() -> Figure:
    """Error on calibration texts against error on other texts, by method and texts."""
    runs = frame()
    models: Sequence[str] = list(dict.fromkeys(runs["model"])) if len(runs) else []
    figure = Figure(figsize=(6.5 * max(1, len(models)), 4.2), layout="constrained")
    for axes, model in zip(figure.subplots(1, max(1, len(models)), squeeze=False)[0], models, strict=False):
        part = runs[(runs["model"] == model) & (runs["granularity"].notna())]
        shown = set(part["texts"])
        for texts, marker in [pair for pair in zip(TEXTS, "os^", strict=True) if pair[0] in shown]:
            means = part[part["texts"] == texts].groupby("method")[["calibration_error", "unseen_error"]].mean()
            means = means.reindex([name for name in METHODS if name in means.index])
            axes.plot(means["calibration_error"], means["unseen_error"], marker=marker, label=f"trained on {texts}")
            for name, row in means.iterrows():
                axes.annotate(str(name), (row["calibration_error"], row["unseen_error"]), fontsize="small")
        axes.set(title=model, xlabel="error on calibration texts", ylabel="error on other texts of the domain")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def main() -> None:
    """Run what is missing."""
    command(__doc__, "rethinking", SCALES, {name: plan(name) for name in SCALES})


if __name__ == "__main__":
    main()
