"""Put the committed results into README and docs: tables between markers, and the figure.

    python benchmarks/publish.py            # write
    python benchmarks/publish.py --check    # fail if a table is not what the results say

A table stands between `<!-- results: NAME -->` and `<!-- end of results -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import pandas
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
RULES = {
    "mask_only": "nothing repaired",
    "bias": "bias only (FLAP)",
    "same_input": "`same_input` (LIAR)",
    "dense_stream": "`dense_stream` (default)",
}


def quality(task: str) -> tuple[float, pandas.DataFrame]:
    """(dense, one row per run) of a task."""
    runs = [json.loads(path.read_text()) for path in sorted((RESULTS / "quality").glob(f"{task}-*-seed*.json"))]
    dense = json.loads((RESULTS / "quality" / f"{task}-dense.json").read_text())
    metric = {"stsb": "spearman", "tinystories": "perplexity"}[task]
    return dense[metric], pandas.DataFrame(runs).rename(columns={metric: "value"})


def quality_table(task: str, digits: int) -> str:
    """Keep ratio against rule: mean and standard deviation over samples of the calibration texts."""
    dense, runs = quality(task)
    rows = []
    for keep, group in sorted(runs.groupby("keep"), reverse=True):
        cells = [list(group[group["rule"] == rule]["value"]) for rule in RULES]
        texts = [f"{mean(cell):.{digits}f} ± {stdev(cell):.{digits}f}" for cell in cells]
        best = (max if task == "stsb" else min)(range(len(cells)), key=lambda i: mean(cells[i]))
        texts[best] = f"**{texts[best]}**"
        rows.append([f"{keep:.0%}", f"{dense:.{digits}f}", *texts])
    return table(["kept", "dense", *RULES.values()], rows)


def speed_table() -> str:
    """Ratios to one plain dense forward pass."""
    rows = []
    for path in sorted(RESULTS.glob("speed-*.json")):
        run = json.loads(path.read_text())
        for target, ratio in run["ratio_median"].items():
            stages = ", ".join(f"{stage} {value:.2f}" for stage, value in run["stages_median"][target].items())
            memory = run["memory"][target]
            peak = f"{memory['grown_mb']:.0f} MB of {memory['bound_mb']:.0f} MB"
            rows.append([run["model"], f"{run['tokens']:,}", f"`{target}`", f"{ratio:.2f}x", stages, peak])
    return table(["model", "tokens", "target", "time", "where it goes", "peak memory of bound"], rows)


def table(headings: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


TABLES: dict[str, Callable[[], str]] = {
    "quality stsb": lambda: quality_table("stsb", 3),
    "quality tinystories": lambda: quality_table("tinystories", 2),
    "speed": speed_table,
}
BLOCK = re.compile(r"(<!-- results: (?P<name>[\w ]+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def filled(text: str) -> str:
    """The text with every table made anew."""
    return BLOCK.sub(lambda match: f"{match[1]}{TABLES[match['name']]()}\n{match[3]}", text)


def pages() -> list[Path]:
    """Where tables may stand."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]


def stale() -> list[Path]:
    """Pages whose tables are not what the results say."""
    return [page for page in pages() if filled(page.read_text(encoding="utf-8")) != page.read_text(encoding="utf-8")]


def draw(file: Path) -> None:
    """Quality against the kept share, for every rule."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for axes, (task, title, unit) in zip(
        figure.subplots(1, 2),
        (
            ("stsb", "BERT encoder: all-MiniLM-L6-v2 on STS-B", "Spearman correlation (more is better)"),
            ("tinystories", "LLaMA: stories260K on TinyStories", "perplexity (less is better)"),
        ),
        strict=True,
    ):
        dense, runs = quality(task)
        for rule, label in RULES.items():
            lines = runs[runs["rule"] == rule].groupby("keep")["value"].agg(["mean", "std"])
            axes.errorbar(lines.index, lines["mean"], lines["std"], marker="o", capsize=3, label=label.replace("`", ""))
        axes.axhline(dense, color="black", linestyle=":", label="dense")
        axes.set(title=title, xlabel="share of block parameters kept", ylabel=unit)
        axes.set_yscale("log" if task == "tinystories" else "linear")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.set_xticks(sorted(runs["keep"].unique()))
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.invert_xaxis()
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def main() -> None:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        sys.exit(f"not what the results say: {', '.join(map(str, stale()))}" if stale() else 0)
    for page in pages():
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    draw(ROOT / "docs" / "images" / "quality.png")


if __name__ == "__main__":
    main()
