"""Tables of the runs with language models: rules on the default masks, whole published methods, common sense by task."""

from __future__ import annotations

from collections.abc import Sequence

import pandas

from benchmarks.results import RESULTS, Record, read_records
from benchmarks.run_keys import DENSE, SELECTED, grid_file
from benchmarks.summary import LABELS, lined
from benchmarks.tasks.commonsense import counted

# Selection and repair of published methods, as their authors combine them; then ours.
PIPELINES: dict[tuple[str, str], str] = {
    ("wanda", "mask_only"): "Wanda-sp",
    ("llm_pruner", "mask_only"): "LLM-Pruner, no LoRA",
    ("flap", "bias"): "FLAP",
    ("flap", "grail"): "GRAIL on FLAP's masks",
    ("flap", "rcpu"): "RCPU's rotation on FLAP's masks",
    ("osscar", "osscar"): "OSSCAR",
    ("searched", "osscar"): "searched widths (Týr-the-Pruner, small), OSSCAR",
    ("reconstruction", "ours"): "ours",
}
# What their masks give with our repair.
MASKS = {
    "wanda": "Wanda-sp",
    "llm_pruner": "LLM-Pruner",
    "flap": "FLAP",
    "osscar": "OSSCAR",
    "searched": "searched widths",
    "searched_from_ours": "searched widths, from ours",
    "query_heads": "ours, by query head",
    "reconstruction": "ours",
}


def pipelines(frame: pandas.DataFrame) -> pandas.DataFrame:
    """The runs of whole methods, named in the column of rules."""
    named = pandas.Series(list(zip(frame["criterion"], frame["rule"], strict=True)), frame.index, dtype=object).map(PIPELINES)
    return frame.assign(rule=named)[named.notna()]


def masks(frame: pandas.DataFrame) -> pandas.DataFrame:
    """The runs of our repair on the masks of all selections, which are named in the column of rules."""
    named = frame["criterion"].map(MASKS)
    return frame.assign(rule=named)[(frame["rule"] == SELECTED) & named.notna()]


def by_share(frame: pandas.DataFrame, names: Sequence[str]) -> str:
    """Perplexity: a row per method, a column per kept share; the least of a column is bold."""
    table = frame.pivot_table(index="rule", columns="keep", values="value", aggfunc="mean")
    table = table.reindex(index=[name for name in names if name in table.index], columns=sorted(table.columns, reverse=True))
    rows = []
    for name, values in table.iterrows():
        shown = ["" if pandas.isna(value) else f"{value:.2f}" for value in values]
        best = [value == table[keep].min() for keep, value in values.items()]
        numbers = (f"**{text}**" if first else text for text, first in zip(shown, best, strict=True))
        rows.append(["**ours**" if name == "ours" else str(name), *numbers])
    return lined(["", *(f"{keep:.0%}" for keep in table.columns)], rows)


def commonsense(model: str, task: str = "commonsense-first-200") -> str:
    """Accuracy of the dense model and after each rule: the mean, and every task by the number that counts."""
    records = read_records(grid_file(RESULTS / "grid", task, model))
    dense = [record for record in records if record["rule"] == DENSE]
    runs = sorted((record for record in records if record["rule"] != DENSE), key=lambda record: -record["keep"])
    names = list(dict.fromkeys(name.split()[0] for record in dense for name in record["tasks"]))
    rows = [["100%", "dense", *_accuracies(record, names)] for record in dense]
    rows += [[f"{run['keep']:.0%}", str(LABELS.get(run["rule"], run["rule"])), *_accuracies(run, names)] for run in runs]
    return lined(["kept", "rule", "mean", *names], rows)


def _accuracies(record: Record, names: Sequence[str]) -> list[str]:
    which = counted(record["tasks"])
    numbers = [record["tasks"][which[name]] for name in names]
    return [f"{record['acc']:.3f}", *(f"{number['accuracy']:.3f} ± {number['error']:.3f}" for number in numbers)]
