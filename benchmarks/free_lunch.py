"""*A Free Lunch in LLM Compression* (Wagner et al. 2025) once more: granularity, criterion and propagation.

    python -m benchmarks.free_lunch --scale stories260K --model STORIES260K --data-dir DATA
    python -m benchmarks.free_lunch --scale smollm2 --model SMOLLM2 --data-dir DATA --hours 1

Single weights (half of them, and 2:4) and whole units (a share of the block parameters) are removed by several criteria, and
what stays is trained at every granularity; the closed form stands beside it. The last weights are kept, as in the study. Every
run is a line in results/free_lunch.jsonl; runs that are there are skipped.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pandas
from matplotlib.figure import Figure

from benchmarks.refinement import Run, Scale, command
from benchmarks.results import RESULTS, Record, read_records
from benchmarks.summary import lined, spread

FILE = RESULTS / "free_lunch.jsonl"
SCALES = {
    "stories260K": Scale("tinystories", length=256, tokens=8_192, evaluated=8_192, seeds=(0, 1, 2)),
    "smollm2": Scale("wikitext-512-first-16384", length=128, tokens=2_048, evaluated=2_048, seeds=(0,)),
}
GRANULARITIES = ("matrix", "sublayer", "block", 2)
PROPAGATIONS = ("global", "pruned", "dense")
# As in the study: one epoch, two sequences a step, a tenth of it warm-up.
TRAINING = {"epochs": 1, "sequences": 2, "warmup": 0.1}
# Larger than in `rethinking.py`: one epoch has few steps.
RATES = {"stories260K": 1e-3, "smollm2": 2e-4}
UNITS = [("units", criterion, 0.8) for criterion in ("reconstruction", "fluctuation", "magnitude")]
WEIGHTS = [("weights", criterion, 0.5) for criterion in ("wanda", "sparsegpt", "magnitude")]
PATTERNS = [("weights", criterion, "2:4") for criterion in ("wanda", "sparsegpt", "magnitude")]


def plan(scale: str) -> list[Run]:
    """The runs on one model: one propagation of everything before the next, and patterns last."""
    runs = []
    for propagation, pruning in [*product(PROPAGATIONS, [*UNITS, *WEIGHTS]), *product(PROPAGATIONS, PATTERNS)]:
        base = Run(*pruning, learning_rate=RATES[scale], propagation=propagation, **TRAINING)  # type: ignore[arg-type]
        if propagation == PROPAGATIONS[0]:
            runs.append(base)
            if pruning[0] == "units":
                runs.append(replace(base, start="closed form"))
        runs += [replace(base, granularity=granularity) for granularity in GRANULARITIES]
    return runs


def kind_of(record: Record) -> str:
    """What is done after pruning."""
    if record["granularity"] is None:
        if record["start"] == "closed form":
            return "closed form"
        return "its own update" if record["criterion"] == "sparsegpt" else "nothing"
    return "windows of 2" if record["granularity"] == 2 else str(record["granularity"])


ORDER = ("nothing", "its own update", "closed form", "matrix", "sublayer", "block", "windows of 2")


# What the kept share is a share of.
COUNTED = {"weights": "weights", "units": "block parameters"}


def frame() -> pandas.DataFrame:
    """The runs, with what they do."""
    return pandas.DataFrame([{**record, "kind": kind_of(record)} for record in read_records(FILE)])


def perplexity(record: pandas.Series) -> str:
    """Which perplexity is that of the domain that was calibrated on."""
    return "perplexity_tinystories" if record["task"] == "tinystories" else "perplexity_wikitext"


def table() -> str:
    """Perplexity on the calibrated domain: a row per pruning and propagation, a column per granularity that was run."""
    runs = frame()
    kinds = [kind for kind in ORDER if len(runs) and kind in set(runs["kind"])]
    rows = []
    if len(runs):
        for (model, removed, keep), block in runs.groupby(["model", "removed", "keep"], sort=False):
            number = perplexity(block.iloc[0])
            for criterion, part in block.groupby("criterion", sort=False):
                for propagation in [name for name in PROPAGATIONS if name in set(part["propagation"])]:
                    shown = []
                    for kind in kinds:
                        group = part[(part["kind"] == kind) & (part["propagation"] == propagation)]
                        shown.append(spread(group[number].mean(), group[number].sem(), ".2f") if len(group) else "")
                    what = f"{keep if isinstance(keep, str) else f'{keep:.0%}'} of the {COUNTED[str(removed)]}"
                    rows.append([str(model), what, str(criterion), propagation, *shown])
    return lined(["model", "kept", "criterion", "propagation", *kinds], rows)


def costs() -> str:
    """Seconds and growth of memory of the training, medians over everything that was pruned."""
    runs = frame()
    rows = []
    if len(runs):
        trained = runs[runs["granularity"].notna()]
        for (model, removed), block in trained.groupby(["model", "removed"], sort=False):
            for kind in [name for name in ORDER if name in set(block["kind"])]:
                group = block[block["kind"] == kind]
                numbers = [f"{group[name].median():.1f}" for name in ("seconds", "grown_mb")]
                rows.append([str(model), str(removed), kind, *numbers])
    return lined(["model", "removed", "granularity", "seconds", "MB more"], rows)


def draw() -> Figure:
    """Perplexity by granularity, a line per criterion; global propagation."""
    runs = frame()
    panels = list(runs.groupby(["model", "removed", "keep"], sort=False)) if len(runs) else []
    figure = Figure(figsize=(5 * max(1, len(panels)), 4.2), layout="constrained")
    for axes, (names, block) in zip(figure.subplots(1, max(1, len(panels)), squeeze=False)[0], panels, strict=False):
        part, number = block[block["propagation"] == PROPAGATIONS[0]], perplexity(block.iloc[0])
        kinds = [kind for kind in ORDER if kind in set(part["kind"])]
        for criterion, group in part.groupby("criterion", sort=False):
            means = group.groupby("kind")[number].agg(["mean", "sem"]).reindex(kinds).dropna(subset=["mean"])
            places = [kinds.index(str(kind)) for kind in means.index]
            axes.errorbar(places, means["mean"], means["sem"].fillna(0), marker="o", capsize=3, label=str(criterion))
        axes.set_xticks(range(len(kinds)), kinds, rotation=30, fontsize="small")
        axes.set(title=" ".join(map(str, names)), ylabel="perplexity", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def main() -> None:
    """Run what is missing."""
    command(__doc__, "free_lunch", SCALES, {name: plan(name) for name in SCALES})


if __name__ == "__main__":
    main()
