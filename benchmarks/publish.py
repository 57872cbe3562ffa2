"""Put the committed results into README and docs: tables between markers, and the figures.

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

import pandas
from elimination import most_gained
from elimination import rows as above_best
from figures import published
from rivals import RULES
from selections import SELECTIONS
from summary import SETTING, also, lined, markdown, runs, shared, standing

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
CRITERION = "fluctuation"
TOKENS = 16_000
CLOSED_FORM = [rule for rule in RULES if rule != "polish"]


def part(criterion: str = CRITERION, **wanted: str | int | float) -> pandas.DataFrame:
    """The runs with one criterion (masks) and these coordinates."""
    frame = runs()
    for name, value in {"criterion": criterion, **wanted}.items():
        frame = frame[frame[name] == value]
    return frame


def ladder(task: str, number: str, criterion: str = CRITERION) -> str:
    """One number of a task against the kept share."""
    frame = part(criterion, task=task, number=number, source="own", tokens=TOKENS)
    return markdown(frame, ["keep"], CLOSED_FORM)


def glue(criterion: str = CRITERION) -> str:
    """All numbers of the fine-tuned models."""
    frame = part(criterion, source="own", tokens=TOKENS)
    frame = frame[frame["task"].str.startswith("glue-") & (frame["number"] != "seconds")]
    # Cells that were run to compare selections have one rule.
    frame = frame[frame.groupby(["task", "model", "keep"])["rule"].transform("nunique") > 1]
    return markdown(frame, ["task", "keep", "number"], CLOSED_FORM)


def selections() -> pandas.DataFrame:
    """Masks of all selections that were run, two or more, after the default reconstruction; they stand where rules do."""
    frame = runs()
    frame = frame[(frame["rule"] == "ours") & (frame["source"] == "own") & (frame["tokens"] == TOKENS)]
    frame = shared(frame.assign(rule=frame["criterion"], criterion="all"), list(SELECTIONS))
    return frame[frame.groupby(["task", "model", "keep"])["rule"].transform("nunique") > 1]


def criteria() -> str:
    """Two numbers of every task by selection: what it is about, and the distance from dense."""
    frame = selections()
    return markdown(frame[frame["place"] < 2], ["task", "keep", "number"], _named(frame))


def standing_of_selections() -> str:
    """In how many cells the default selection is best of all."""
    frame = selections()
    return standing(frame, "reconstruction", [name for name in _named(frame) if name != "reconstruction"])


def _named(frame: pandas.DataFrame) -> list[str]:
    """The selections that are there, in the order of the tables."""
    return [name for name in SELECTIONS if name in set(frame["rule"])]


def dropping() -> str:
    """Two numbers where whole sub-layers may go, and where every site keeps a unit."""
    frame = runs(RESULTS / "dropping")
    frame = frame[(frame["rule"] == "ours") & (frame["place"] < 2)]
    return markdown(frame.assign(rule=frame["criterion"]), ["task", "keep", "number"], ["reconstruction", "dropping"])


def other_tokens(criterion: str = CRITERION) -> str:
    """What each task is about, with less and with more calibration data than elsewhere."""
    frame = part(criterion, source="own", place=0)
    return markdown(frame[frame["tokens"] != TOKENS], ["task", "number", "keep", "tokens"], CLOSED_FORM)


def other_texts(criterion: str = CRITERION) -> str:
    """Two numbers of every task, calibrated on C4 and on its own texts."""
    frame = part(criterion)
    frame = also(frame[frame["place"] < 2], frame["source"] != "own", ["task", "model", "keep", "tokens"])
    return markdown(frame, ["task", "keep", "tokens", "source", "number"], CLOSED_FORM)


def standing_of_rules() -> str:
    """In how many cells the default is best of all closed forms."""
    return standing(runs(), "ours", [rule for rule in CLOSED_FORM if rule != "ours"])


def polish(criterion: str = CRITERION) -> str:
    """Ours against training, where both were run: two numbers of every task, and the time."""
    frame = part(criterion, source="own")
    frame = frame[(frame["place"] < 2) | (frame["number"] == "seconds")]
    for rule in ("ours", "polish"):
        frame = also(frame, frame["rule"] == rule, SETTING)
    return markdown(frame, ["task", "keep", "tokens", "number"], ["ours", "polish"])


def speed() -> str:
    """Ratios to one plain dense forward pass."""
    rows = []
    for path in sorted(RESULTS.glob("speed-*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        for target, ratio in run["ratio_median"].items():
            stages = ", ".join(f"{stage} {value:.2f}" for stage, value in run["stages_median"][target].items())
            memory = run["memory"][target]
            peak = f"{memory['grown_mb']:.0f} MB of {memory['bound_mb']:.0f} MB"
            rows.append([run["model"], f"{run['tokens']:,}", f"`{target}`", f"{ratio:.2f}x", stages, peak])
    return lined(["model", "tokens", "target", "time", "where it goes", "peak memory of bound"], rows)


def latency() -> str:
    """Shares of the dense model's time: asked, and measured."""
    rows = []
    for path in sorted(RESULTS.glob("latency-*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        for share in run["shares"]:
            numbers = [f"{share[key]:.1%}" for key in ("asked", "measured", "parameters")]
            rows.append([run["model"], f"{run['batch_size']} x {run['length']}", *numbers, f"{1 / share['measured']:.2f}x"])
    return lined(["model", "batch", "time asked", "time measured", "parameters left", "faster by"], rows)


def elimination() -> str:
    """How far from the best of all subsets elimination ends."""
    (path,) = RESULTS.glob("elimination-*.json")
    headings = ["small problems", "median", "mean", "mean after swaps"]
    return lined(headings, above_best(json.loads(path.read_text(encoding="utf-8"))))


def elimination_time() -> str:
    """How long elimination takes, and what swaps add on real sites."""
    (path,) = RESULTS.glob("elimination-*.json")
    run = json.loads(path.read_text(encoding="utf-8"))
    real, wide = run["real"], run["growth"]
    sizes = ", ".join(f"{width:,}" for width in wide["widths"])
    seconds = ", ".join(f"{each:.1f} s" for each in wide["seconds"])
    rows = [
        [
            f"{real['units']:,} neurons, beside one dense pass over {run['tokens']:,} tokens",
            f"{real['neurons_ratio_median']:.2f}x",
        ],
        ["the heads of one layer with their swaps, likewise", f"{real['heads_ratio_median']:.2f}x"],
        [f"{sizes} neurons", seconds],
        [
            f"{wide['wide']:,} neurons, extrapolated from the growth between the last two, or the cube if that is more",
            f"{wide['wide_seconds_extrapolated']:,.0f} s",
        ],
        [f"memory for {wide['wide']:,} neurons", f"{wide['wide_gigabytes']:.1f} GB"],
        ["error that swaps take away at the heads of a layer of all-MiniLM-L6-v2, at most", f"{most_gained(run, 'heads'):.1%}"],
        ["error that they would take away at its neurons, at most", f"{most_gained(run, 'neurons'):.1%}"],
    ]
    return lined(["elimination", ""], rows)


TABLES: dict[str, Callable[[], str]] = {
    "standing": standing_of_rules,
    "standing of selections": standing_of_selections,
    "criteria": criteria,
    "dropping": dropping,
    "ladder stsb reconstruction": lambda: ladder("stsb", "spearman", "reconstruction"),
    "ladder stsb cosine reconstruction": lambda: ladder("stsb", "cosine", "reconstruction"),
    "ladder tinystories reconstruction": lambda: ladder("tinystories", "perplexity", "reconstruction"),
    "ladder tinystories kl reconstruction": lambda: ladder("tinystories", "kl", "reconstruction"),
    "ladder glue reconstruction": lambda: glue("reconstruction"),
    "ladder stsb": lambda: ladder("stsb", "spearman"),
    "ladder stsb cosine": lambda: ladder("stsb", "cosine"),
    "ladder tinystories": lambda: ladder("tinystories", "perplexity"),
    "ladder tinystories kl": lambda: ladder("tinystories", "kl"),
    "ladder glue": glue,
    "other tokens reconstruction": lambda: other_tokens("reconstruction"),
    "other texts reconstruction": lambda: other_texts("reconstruction"),
    "other tokens": other_tokens,
    "other texts": other_texts,
    "polish": lambda: polish("reconstruction"),
    "speed": speed,
    "latency": latency,
    "elimination": elimination,
    "elimination time": elimination_time,
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


def draw(images: Path) -> None:
    """Quality against the kept share, by rule and by selection, and against the calibration tokens."""
    kept = {task: part("reconstruction", task=task, source="own", tokens=TOKENS, place=0) for task in ("stsb", "tinystories")}
    published(kept, "keep", CLOSED_FORM, images / "quality.png")
    tokens = {task: part(task=task, source="own", keep=keep, place=0) for task, keep in (("stsb", 0.5), ("tinystories", 0.8))}
    published(tokens, "tokens", CLOSED_FORM, images / "tokens.png")
    frame = selections()
    masks = {task: frame[(frame["task"] == task) & (frame["place"] == 0)] for task in ("stsb", "tinystories")}
    published(masks, "keep", _named(frame), images / "criteria.png")


def main() -> None:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        sys.exit(f"not what the results say: {', '.join(map(str, stale()))}" if stale() else 0)
    for page in pages():
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    draw(ROOT / "docs" / "images")


if __name__ == "__main__":
    main()
