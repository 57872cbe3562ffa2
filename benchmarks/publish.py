"""Put the committed results and the options into README and docs: tables between markers, and the figures.

    python -m benchmarks.publish            # write
    python -m benchmarks.publish --check    # fail if a table or a figure is out of date

A table is between `<!-- results: NAME -->` and `<!-- end of results -->`; one of options between `<!-- options: CLASS -->` and
`<!-- end of options -->`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path

import pandas
from matplotlib.figure import Figure

from benchmarks import (
    by_block,
    damping,
    families,
    free_lunch,
    growth,
    inference,
    more_text,
    offload,
    planning,
    rethinking,
    samples,
    scaling,
    self_generation,
    speed,
    squad,
    standing,
    starts,
    steps,
)
from benchmarks.baselines import CLOSED_FORM
from benchmarks.elimination import rows as above_best
from benchmarks.few_tokens import HEADINGS as FEW_TOKENS
from benchmarks.few_tokens import rows as few_tokens_rows
from benchmarks.figures import fingerprint, fingerprint_of, published, save
from benchmarks.language_models import MASKS, PIPELINES, by_share, commonsense, masks, pipelines
from benchmarks.results import RESULTS, read_records
from benchmarks.run_keys import SELECTED
from benchmarks.selections import SELECTIONS
from benchmarks.summary import CHANCE, LABELS, SETTING, common_samples, lined, markdown, runs, with_coordinates_of
from benchmarks.wikitext import TOKENS as WIKITEXT_TOKENS
from liar import options

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
CRITERION = "fluctuation"
TOKENS = 16_000
# Selections that the language model was pruned by, with what was said on every example.
COMPARED_SELECTIONS = ("reconstruction", "wanda", "llm_pruner", "flap", "osscar")
# What was read of the evaluation data.
SQUAD = "squad-every-4"
WIKITEXT = "wikitext-512-first-16384"
# The same on a GPU, with more calibration tokens and all of the evaluation data.
WIKITEXT_GPU = "wikitext-1024"
# Benchmarks of fine-tuned models: the tasks that each is the mean of, and the calibration tokens.
FINE_TUNED = {
    "GLUE: mean of SST-2, MRPC, STS-B and QNLI": (("glue-sst2", "glue-mrpc", "glue-stsb", "glue-qnli"), TOKENS),
    "SQuAD v1.1: F1": ((SQUAD,), *squad.TOKENS),
}
# Of the rules what their authors published, and ours.
PUBLISHED = ("mask_only", "bias", "mask_tuning", "liar", "grail", "rcpu", "kprune", "osscar", "ours")
# Rules that were run in nearly every cell.
COMMON = ("mask_only", "bias", "mask_tuning_dense", "liar", "grail", "kprune", "osscar_fullseq", SELECTED, "ours")
# Models of benchmarks/speed.py with trained weights.
REAL = {"minilm": "all-MiniLM-L6-v2", "smollm2": "SmolLM2-135M"}
# Of a run of benchmarks/lora.py, in the order of its table.
SCORES_OF_LORA = ("dense", "pruned", "tuned")
# Titles of figures.
ENCODER = "BERT encoder: all-MiniLM-L6-v2 on STS-B"
STORIES = "LLaMA: stories260K on TinyStories"


BY_TEXTS = ["task", "model", "source", "keep"]
DRIFT_RULES = ("osscar", "grail", "liar", SELECTED, "ours")


def part(criterion: str = CRITERION, **coordinates: str | int | float) -> pandas.DataFrame:
    """The runs with one criterion (masks) and these coordinates."""
    frame = runs()
    for name, value in {"criterion": criterion, **coordinates}.items():
        frame = frame[frame[name] == value]
    return frame


def grid(task: str, number: str, criterion: str = CRITERION) -> str:
    """One number of a task against the kept share."""
    frame = part(criterion, task=task, number=number, source="own", tokens=TOKENS)
    return markdown(frame, ["keep"], CLOSED_FORM)


def glue(criterion: str = CRITERION) -> str:
    """All numbers of the fine-tuned models."""
    frame = part(criterion, source="own", tokens=TOKENS)
    frame = frame[frame["task"].str.startswith("glue-") & (frame["number"] != "seconds")]
    # What was run to compare selections has one rule.
    frame = frame[frame.groupby(["task", "model", "keep"])["rule"].transform("nunique") > 1]
    return markdown(frame, ["task", "keep", "number"], CLOSED_FORM)


def selections() -> pandas.DataFrame:
    """Masks of all selections that were run, two or more, after one reconstruction; named in the column of rules."""
    frame = runs()
    frame = frame[(frame["rule"] == SELECTED) & (frame["source"] == "own") & (frame["tokens"] == TOKENS)]
    frame = common_samples(frame.assign(rule=frame["criterion"], criterion="all"), list(SELECTIONS))
    return frame[frame.groupby(["task", "model", "keep"])["rule"].transform("nunique") > 1]


def criteria() -> str:
    """Two numbers of every task by selection: what it is about, and the distance from dense."""
    frame = selections()
    return markdown(frame[frame["place"] < 2], ["task", "keep", "number"], _named(frame))


def _named(frame: pandas.DataFrame) -> list[str]:
    """The selections that are there, in the order of the tables."""
    return [name for name in SELECTIONS if name in set(frame["rule"])]


def other_tokens(criterion: str = CRITERION) -> str:
    """What each task is about, with less and with more calibration data than elsewhere."""
    frame = part(criterion, source="own", place=0)
    return markdown(frame[frame["tokens"] != TOKENS], ["task", "number", "keep", "tokens"], CLOSED_FORM)


def other_texts(criterion: str = CRITERION) -> str:
    """Two numbers of every task, calibrated on C4 and on its own texts."""
    frame = part(criterion)
    frame = frame[(frame["place"] < 2) & (frame["source"] != "evaluated")]
    frame = with_coordinates_of(frame, frame["source"] != "own", ["task", "model", "keep", "tokens"])
    return markdown(frame, ["task", "keep", "tokens", "source", "number"], CLOSED_FORM)


def fine_tuning(criterion: str = CRITERION) -> str:
    """Ours against training, where both were run: two numbers of every task, and the time."""
    frame = part(criterion, source="own")
    frame = frame[(frame["place"] < 2) | (frame["number"] == "seconds")]
    for rule in ("ours", "fine_tuning"):
        frame = with_coordinates_of(frame, frame["rule"] == rule, SETTING)
    return markdown(frame, ["task", "keep", "tokens", "number"], ["ours", "fine_tuning"])


def share_of_dense(rules: Sequence[str] = CLOSED_FORM, criterion: str = "reconstruction") -> str:
    """Scores of fine-tuned models as shares of the dense model's: a row per benchmark and kept share, a column per rule."""
    rows = []
    for benchmark, means in _shares(rules, criterion):
        for keep, row in means.iterrows():
            shown = [
                "" if pandas.isna(share) else f"**{share:.1%}**" if share == row.max() else f"{share:.1%}" for share in row
            ]
            rows.append([benchmark, f"{keep:.0%}", *shown])
    return lined(["benchmark", "kept", *("**ours**" if rule == "ours" else LABELS[rule] for rule in rules)], rows)


def _shares(rules: Sequence[str], criterion: str = "reconstruction") -> Iterator[tuple[str, pandas.DataFrame]]:
    """Of every benchmark of fine-tuned models, means of the shares of the dense score, [kept share, rule]."""
    frame = part(criterion, source="own", place=0)
    frame = frame.assign(share=frame["value"] / frame["dense"])
    for benchmark, (tasks, tokens) in FINE_TUNED.items():
        scores = common_samples(frame[frame["task"].isin(tasks) & (frame["tokens"] == tokens)], rules)
        # A mean over fewer tasks is another number.
        scores = scores[scores.groupby(["keep", "rule"])["task"].transform("nunique") == len(tasks)]
        means = scores.pivot_table(index="keep", columns="rule", values="share", aggfunc="mean").reindex(columns=[*rules])
        yield benchmark, means.dropna(thresh=2).sort_index(ascending=False)


def headline() -> str:
    """The main results for a reader who is new: the mask alone, the best of the other published rules, and ours."""
    rows = [
        [f"MiniLM, {benchmark}, share of dense ↑", f"{keep:.0%}", "100%", *_in_short(row, ".1%", more=True)]
        for benchmark, means in _shares((*PUBLISHED, SELECTED))
        for keep, row in means.iterrows()
    ]
    frame = wikitext()
    frame = common_samples(frame[frame["criterion"] == "reconstruction"], (*PUBLISHED, SELECTED))
    means = frame.pivot_table(index=["keep", "dense"], columns="rule", values="value", aggfunc="mean")
    for (keep, dense), row in means.sort_index(ascending=False).iterrows():
        title = "SmolLM2-135M, WikiText-2: perplexity ↓"
        rows.append([title, f"{keep:.0%}", f"{dense:.1f}", *_in_short(row, ".1f", more=False)])
    return lined(["model and task", "kept", "dense", "mask only", "best other method", "**liar**"], rows)


def _in_short(row: pandas.Series, form: str, *, more: bool) -> list[str]:
    """The mask alone, the best of the other rules with its name, and ours, with a star if not the default; the best is bold."""
    others = row.drop(["mask_only", "ours", SELECTED], errors="ignore").dropna()
    name = others.idxmax() if more else others.idxmin()
    is_default = pandas.notna(row.get("ours"))
    values = [row["mask_only"], others[name], row["ours" if is_default else SELECTED]]
    best = max(values) if more else min(values)
    shown = [f"**{value:{form}}**" if value == best else f"{value:{form}}" for value in values]
    # The column beside it has the library's name, which is that of the paper's method.
    label = "LIAR, paper" if name == "liar" else LABELS[name]
    return [shown[0], f"{shown[1]} ({label})", shown[2] + ("" if is_default else " *")]


def cost() -> str:
    """What `prune` takes of real models."""
    rows = []
    for run in read_records(RESULTS / "speed.jsonl"):
        if run["model"] in REAL:
            seconds, ratio = run["plain_seconds_median"], run["ratio_median"]["prune"]
            tokens = f"{run['tokens']:,}"
            rows.append([REAL[run["model"]], tokens, f"{seconds:.0f} s", f"{ratio:.1f} times that: {seconds * ratio:.0f} s"])
    return lined(["model", "calibration tokens", "one forward pass over them", "`liar.prune`"], rows)


def wikitext(source: str = "own", task: str = WIKITEXT) -> pandas.DataFrame:
    """The runs on WikiText-2 with the usual number of calibration tokens."""
    frame = runs()
    frame = frame[(frame["task"] == task) & (frame["source"] == source) & (frame["place"] == 0)]
    return frame[frame["tokens"].isin(WIKITEXT_TOKENS) | (frame["task"] != WIKITEXT)]


def exact_rotary() -> str:
    """Perplexity of the model whose rotary frequencies stay in float32: the mask alone, and ours."""
    table = pandas.DataFrame(read_records(RESULTS / "exact_rotary.jsonl"))
    table = table.pivot_table(index=["source", "keep"], columns="rule", values="perplexity").sort_index(ascending=False)
    rows = [
        [source, f"{keep:.0%}", *("" if pandas.isna(row[rule]) else f"{row[rule]:.2f}" for rule in ("mask_only", "ours"))]
        for (source, keep), row in table.iterrows()
    ]
    return lined(["texts", "kept", LABELS["mask_only"], "**ours**"], rows)


def wikitext_rules(source: str = "own", rules: Sequence[str] = CLOSED_FORM, task: str = WIKITEXT) -> str:
    """Perplexity against the kept share, default masks."""
    frame = wikitext(source, task)
    return markdown(frame[frame["criterion"] == "reconstruction"], ["keep"], rules)


def drift(tasks: Sequence[str], numbers: Sequence[str]) -> str:
    """Some numbers with all of the drift in the target, and with the damped target, beside the best repairs of others."""
    frame = runs()
    frame = frame[frame["task"].isin(tasks) & frame["number"].isin(numbers) & (frame["criterion"] == "reconstruction")]
    frame = frame[frame["tokens"].isin((TOKENS, *WIKITEXT_TOKENS))]
    for rule in ("ours", SELECTED):
        frame = with_coordinates_of(frame, frame["rule"] == rule, SETTING)
    return markdown(frame, BY_TEXTS if len(numbers) == 1 else ["number", "source", "keep"], DRIFT_RULES)


def created_biases() -> str:
    """Perplexity with biases in layers that have none, where that was run."""
    frame = runs()
    frame = frame[(frame["number"] == "perplexity") & (frame["criterion"] == "reconstruction")]
    frame = with_coordinates_of(frame, frame["rule"] == "ours_created_bias", SETTING)
    return markdown(frame, BY_TEXTS, ["ours", "ours_created_bias"])


def masks_with_more_text(criterion: str, rules: Sequence[str] = CLOSED_FORM) -> str:
    """Perplexity with less and with more calibration text, from which come both the mask and its repair."""
    frame = part(criterion, task=WIKITEXT, source="own", place=0)
    frame = frame[frame["rule"].isin(rules)]
    return markdown(with_coordinates_of(frame, ~frame["tokens"].isin(WIKITEXT_TOKENS), ["keep"]), ["keep", "tokens"], rules)


def whole_methods(task: str = WIKITEXT) -> str:
    """Perplexity of whole published methods, each with its own masks."""
    return by_share(pipelines(wikitext(task=task)), list(PIPELINES.values()))


def masks_of_others() -> str:
    """Perplexity of the masks of others after our repair."""
    return by_share(masks(wikitext()), list(MASKS.values()))


@cache
def compared(rules: Sequence[str] = CLOSED_FORM, criterion: str = "reconstruction") -> pandas.DataFrame:
    """All pairs of rules in the cells of one selection of masks that have all of these rules."""
    frame = standing.compared(rules)
    return frame[frame["criterion"] == criterion]


def speed_table() -> str:
    """Ratios to one plain dense forward pass."""
    return lined(speed.HEADINGS, [row for run in read_records(RESULTS / "speed.jsonl") for row in speed.rows(run)])


def select_table() -> str:
    """Where the time of a selection goes, beside what it computes."""
    return lined(speed.PARTS, [row for run in read_records(RESULTS / "speed.jsonl") for row in speed.parts_of_select(run)])


def growth_table() -> str:
    """How cost grows with tokens, width and layers."""
    return lined(growth.HEADINGS, growth.rows(read_records(RESULTS / "growth.jsonl")))


def samples_table() -> str:
    """What is lost by reading a sample."""
    return lined(samples.HEADINGS, samples.rows(read_records(RESULTS / "samples.jsonl")))


def more_text_table(task: str | None = None) -> str:
    """What more calibration text does to the repair of one mask, in all tasks or in one."""
    records = [record for record in read_records(more_text.FILE) if task in (None, record["task"])]
    return lined(more_text.HEADINGS, more_text.rows(records))


def latency() -> str:
    """Shares of the dense model's time: requested, and measured."""
    rows = []
    for run in read_records(RESULTS / "latency.jsonl"):
        numbers = [f"{run[name]:.1%}" for name in ("keep", "measured", "parameters")]
        rows.append([run["model"], f"{run['batch_size']} x {run['length']}", *numbers, f"{1 / run['measured']:.2f}x"])
    return lined(["model", "batch", "time requested", "time measured", "parameters left", "faster by"], rows)


def onnx() -> str:
    """Seconds of the dense and the slim model in ONNX Runtime."""
    rows = []
    for run in read_records(RESULTS / "onnx_speed.jsonl"):
        for batch, both in run["seconds"].items():
            times = [f"{1000 * each:.1f} ms" for each in both]
            rows.append([run["model"], f"{run['keep']:.0%}", batch, *times, f"{run['faster'][batch]:.2f}x"])
    return lined(["model", "kept", "batch", "dense", "slim", "faster by"], rows)


def lora() -> str:
    """Scores of fine-tuned models: dense, pruned, and after one epoch of LoRA."""
    rows = []
    for run in read_records(RESULTS / "lora.jsonl"):
        errors = [CHANCE[run["metric"]](run[name], run["examples"]) for name in SCORES_OF_LORA]
        scores = [f"{run[name]:.3f} ± {error:.3f}" for name, error in zip(SCORES_OF_LORA, errors, strict=True)]
        rows.append([run["task"], f"{run['keep']:.0%}", LABELS[run["rule"]], *scores, f"{run['changed']} of {run['examples']}"])
    return lined(["task", "kept", "rule", "dense", "pruned", "after LoRA", "answers that LoRA changed"], rows)


def self_generation_table() -> str:
    """How long a model takes to write calibration texts."""
    return lined(
        self_generation.HEADINGS, [self_generation.row(run) for run in read_records(RESULTS / "self_generation.jsonl")]
    )


def llama_cpp() -> str:
    """How far llama.cpp is from PyTorch."""
    rows = [
        [run["model"], f"{run['keep']:.0%}", run["widths"], f"{run['error']:.0e}", f"{run['same']:.0%}"]
        for run in read_records(RESULTS / "llama_cpp.jsonl")
    ]
    return lined(["model", "kept", "widths", "relative error of the logits", "same largest logit"], rows)


def few_tokens() -> str:
    """Whether the repair is ever worse than the mask alone."""
    return lined(list(FEW_TOKENS), few_tokens_rows(read_records(RESULTS / "few_tokens.jsonl")))


def elimination() -> str:
    """How far from the best of all subsets elimination ends."""
    (run,) = read_records(RESULTS / "elimination.jsonl")
    return lined(["small problems", "median", "mean"], above_best(run))


def label_sampling() -> str:
    """How many settings have masks from the former label sampling, and how many from the present one."""
    frame = runs()
    frame = frame[frame["labels"].notna()].drop_duplicates([*SETTING, "labels"])
    counts = frame.groupby(["task", "criterion", "labels"], sort=False).size().unstack("labels", fill_value=0)
    counts = counts.reindex(columns=["by sequence", "by batch"], fill_value=0)
    rows = [[*names, *map(str, row)] for names, row in zip(counts.index, counts.to_numpy(), strict=True)]
    return lined(["task", "masks", "settings sampled by sequence", "settings sampled by batch"], rows)


def planned_cases() -> str:
    """What runs were said to need, beside what they took."""
    return lined(planning.HEADINGS, [planning.row(run) for run in read_records(planning.FILE)])


def planned_sizes() -> str:
    """What models of several sizes will need."""
    return lined(planning.SIZE_HEADINGS, [planning.size_row(run) for run in read_records(planning.SIZES_FILE)])


TABLES: dict[str, Callable[[], str]] = {
    "standing": lambda: standing.table(compared(), "ours"),
    "standing by task": lambda: standing.by_task(compared(), "ours"),
    "behind": lambda: standing.behind(compared(), "ours"),
    "standing common": lambda: standing.by_task(compared(COMMON), "ours"),
    "behind common": lambda: standing.behind(compared(COMMON), "ours"),
    "standing common fluctuation": lambda: standing.by_task(compared(COMMON, CRITERION), "ours"),
    "behind common fluctuation": lambda: standing.behind(compared(COMMON, CRITERION), "ours"),
    "share of dense": share_of_dense,
    "headline": headline,
    "cost": cost,
    "grid squad": lambda: markdown(part("reconstruction", task=SQUAD, source="own"), ["keep", "number"], CLOSED_FORM),
    "squad more text": lambda: markdown(
        part("reconstruction", task="squad", number="f1"), ["keep", "tokens", "source"], CLOSED_FORM
    ),
    "families": families.table,
    "mpnet": lambda: markdown(
        part("reconstruction", model="mpnet"), ["keep", "number"], ("mask_only", "liar", SELECTED, "ours")
    ),
    "wikitext": wikitext_rules,
    "wikitext c4": lambda: wikitext_rules("c4"),
    "drift": partial(drift, ["tinystories", WIKITEXT], ["perplexity"]),
    "drift encoder": partial(drift, ["stsb"], ["spearman", "cosine"]),
    "created biases": created_biases,
    "wikitext more text": partial(masks_with_more_text, CRITERION),
    "wikitext more text reconstruction": partial(masks_with_more_text, "reconstruction", ("ours",)),
    "pipelines": whole_methods,
    "masks of others": masks_of_others,
    "common sense": lambda: commonsense("smollm2"),
    "gpu wikitext": lambda: wikitext_rules(task=WIKITEXT_GPU),
    "gpu wikitext exact rotary": exact_rotary,
    "gpu wikitext c4": lambda: wikitext_rules("c4", task=WIKITEXT_GPU),
    "gpu pipelines": lambda: whole_methods(WIKITEXT_GPU),
    "gpu common sense": lambda: commonsense("smollm2-bfloat16"),
    "inference": lambda: inference.table(read_records(RESULTS / "inference.jsonl")),
    "damping": lambda: damping.table(read_records(damping.FILE)),
    "standing of selections": lambda: standing.by_task(
        standing.compared(COMPARED_SELECTIONS, by="criterion"), "reconstruction"
    ),
    "criteria": criteria,
    "grid stsb reconstruction": lambda: grid("stsb", "spearman", "reconstruction"),
    "grid stsb cosine reconstruction": lambda: grid("stsb", "cosine", "reconstruction"),
    "grid tinystories reconstruction": lambda: grid("tinystories", "perplexity", "reconstruction"),
    "grid tinystories kl reconstruction": lambda: grid("tinystories", "kl", "reconstruction"),
    "grid glue reconstruction": lambda: glue("reconstruction"),
    "grid stsb": lambda: grid("stsb", "spearman"),
    "grid stsb cosine": lambda: grid("stsb", "cosine"),
    "grid tinystories": lambda: grid("tinystories", "perplexity"),
    "grid tinystories kl": lambda: grid("tinystories", "kl"),
    "grid glue": glue,
    "other tokens reconstruction": lambda: other_tokens("reconstruction"),
    "other texts reconstruction": lambda: other_texts("reconstruction"),
    "other tokens": other_tokens,
    "other texts": other_texts,
    "fine-tuning": lambda: fine_tuning("reconstruction"),
    "speed": speed_table,
    "select": select_table,
    "growth": growth_table,
    "scaling": scaling.table,
    "offload": offload.table,
    "samples": samples_table,
    "more text": more_text_table,
    "more text of a language model": partial(more_text_table, WIKITEXT),
    "planned cases": planned_cases,
    "planned sizes": planned_sizes,
    "latency": latency,
    "few tokens": few_tokens,
    "onnx": onnx,
    "lora": lora,
    "llama cpp": llama_cpp,
    "self generation": self_generation_table,
    "elimination": elimination,
    "rethinking": rethinking.table,
    "free lunch": free_lunch.table,
    "free lunch costs": free_lunch.costs,
    "starts": starts.table,
    "starts saved": starts.saved,
    "steps": steps.table,
    "label sampling": label_sampling,
}
RESULT_BLOCK = re.compile(r"(<!-- results: (?P<name>[\w -]+) -->\n).*?(<!-- end of results -->)", re.DOTALL)
OPTION_BLOCK = re.compile(r"(<!-- options: (?P<groups>[\w ]+) -->\n).*?(<!-- end of options -->)", re.DOTALL)


def filled(text: str) -> str:
    """The text with every table of results and of options generated again."""
    text = RESULT_BLOCK.sub(lambda match: f"{match[1]}{TABLES[match['name']]()}\n{match[3]}", text)
    return OPTION_BLOCK.sub(lambda match: f"{match[1]}{option_table(match['groups'])}\n{match[3]}", text)


def option_table(groups: str) -> str:
    """The options of some classes of `liar.options`, named one after the other."""
    return options.options_table(*(getattr(options, group) for group in groups.split()))


def pages() -> list[Path]:
    """Pages that may have tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]


def stale() -> list[Path]:
    """Pages whose tables, and images whose lines, are not what the results say."""
    texts = [page for page in pages() if filled(page.read_text(encoding="utf-8")) != page.read_text(encoding="utf-8")]
    return texts + [IMAGES / name for name, draw in FIGURES.items() if fingerprint_of(IMAGES / name) != fingerprint(draw())]


def encoder_figure() -> Figure:
    """Rules on an encoder against the kept share: two tasks."""
    parts = {
        title: part("reconstruction", task=task, model=model, source="own", tokens=TOKENS, place=0)
        for title, task, model in (("STS-B, zero-shot", "stsb", "default"), ("SQuAD v1.1, fine-tuned", SQUAD, "squad"))
    }
    return published(parts, "keep", PUBLISHED)


def llama_figure() -> Figure:
    """Perplexity of a LLaMA against the kept share: rules on the same masks, and whole methods."""
    frame = wikitext()
    parts = {
        "rules on the same masks": frame[frame["criterion"] == "reconstruction"],
        "methods with masks of their own": pipelines(frame),
    }
    return published(parts, "keep", list(dict.fromkeys([*PUBLISHED, *PIPELINES.values()])))


def tokens_figure() -> Figure:
    """Quality against the calibration tokens."""
    parts = {ENCODER: part(task="stsb", source="own", keep=0.5, place=0)}
    parts |= {STORIES: part(task="tinystories", source="own", keep=0.8, place=0)}
    return published(parts, "tokens", CLOSED_FORM)


def criteria_figure() -> Figure:
    """Quality against the kept share, by selection."""
    frame = selections()
    frame = frame[frame["place"] == 0]
    parts = {title: frame[frame["task"] == task] for title, task in ((ENCODER, "stsb"), (STORIES, "tinystories"))}
    return published(parts, "keep", _named(frame))


FIGURES: dict[str, Callable[[], Figure]] = {
    "encoder.png": encoder_figure,
    "llama.png": llama_figure,
    "scaling.png": scaling.draw,
    "by_block.png": by_block.draw,
    "growth.png": lambda: growth.draw(read_records(RESULTS / "growth.jsonl")),
    "tokens.png": tokens_figure,
    "criteria.png": criteria_figure,
    "rethinking.png": rethinking.draw,
    "free_lunch.png": free_lunch.draw,
}


def main() -> None:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        outdated = stale()
        sys.exit(f"not what the results say: {', '.join(map(str, outdated))}" if outdated else 0)
    for page in pages():
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    for name, draw in FIGURES.items():
        figure = draw()
        if fingerprint_of(IMAGES / name) != fingerprint(figure):
            save(figure, IMAGES / name)


if __name__ == "__main__":
    main()
