"""How a repair that errs less block by block can give a worse model: errors after every block, on both kinds of text.

    python -m benchmarks.by_block --model SMOLLM2 --data-dir DATA

A causal language model is pruned and repaired, calibrated on web pages (C4). Block after block of the dense model is then
replaced by the repaired one, and measured on texts that were not calibrated on, of the same kind and of WikiText-2: the error
of the residual stream after the block, relative to the dense model's, and how far the next-token distributions are from the
dense model's (KL divergence). The first token of every sequence is left out: its stream is hundreds of times as large as that
of the others. Runs that are in results/by_block.jsonl are skipped; `benchmarks.publish` draws docs/images/by_block.png.
"""

from __future__ import annotations

import argparse
import copy
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import liar
from benchmarks.baselines import RULES
from benchmarks.bench import Bench, SharedInputs
from benchmarks.figures import FRONT, OTHERS, OURS
from benchmarks.metrics import metric
from benchmarks.results import RESULTS, Record, ResultFile, matches
from benchmarks.run_keys import SELECTED, Setting
from benchmarks.summary import LABELS, show
from benchmarks.tasks import TASKS
from liar.models import transformer_in
from liar.runtime import Point, capture_activations

TASK = "wikitext-512-first-16384"
CALIBRATED_ON, TOKENS = "c4", 8_192
COMPARED = ("liar", SELECTED, "ours")
# Kinds of texts that are measured on, and how many tokens of each.
MEASURED_ON, MEASURED_TOKENS = {"c4": "web pages", "own": "WikiText-2"}, 1_024
# The output is measured after every so many blocks: a pass for each.
EVERY = 3
STREAM, KL = "error of the stream", "KL divergence at the output"


def unseen(shared: SharedInputs, source: str) -> list[dict[str, Tensor]]:
    """Sequences of texts that the calibration data does not have: the last of the shuffled ones, where that has the first."""
    bench, setting = shared.bench, shared.setting
    texts = list(reversed(list(bench.task.texts(bench.data_dir, source, setting.seed))))
    return liar.calibration(
        texts, bench.loaded[1], tokens=MEASURED_TOKENS, max_length=bench.task.max_length, pack=bench.task.pack, progress=False
    )


@torch.inference_mode()
def streams(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> tuple[list[Tensor], Tensor]:
    """The stream after every block, and the logits, of all tokens but the first of each sequence: [tokens, ...] each."""
    inner = transformer_in(model)
    blocks = {name: Point(inner.get_submodule(name), argument=None) for name in liar.discover(model).blocks}
    after, logits = [], []
    for batch in batches:
        with capture_activations(blocks) as outputs:
            logits.append(_rows(model(**batch, use_cache=False).logits))
        after.append([_rows(outputs[name]) for name in blocks])
    return [torch.cat(parts) for parts in zip(*after, strict=True)], torch.cat(logits)


def _rows(output: Any) -> Tensor:
    values: Tensor = output[0] if isinstance(output, tuple) else output
    return values[:, 1:].flatten(0, 1).float()


def hybrids(dense: nn.Module, repaired: nn.Module) -> Iterator[nn.Module]:
    """The dense model with its first block replaced, with its first two, and so on: one model that changes."""
    model = copy.deepcopy(dense)
    for name in liar.discover(dense).blocks:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, repaired.get_submodule(name))
        yield model


def measure(shared: SharedInputs, rule: str) -> Record:
    """The error of the stream after every block, and the divergence after every third, by kind of text."""
    dense, _ = shared.bench.loaded
    repaired = copy.deepcopy(dense)
    RULES[rule](repaired, shared.mask, shared.calibration, **shared.options(rule))
    found: Record = {}
    for source, name in MEASURED_ON.items():
        batches = unseen(shared, source)
        want, logits = streams(dense, batches)
        got, _ = streams(repaired, batches)
        near = [
            metric("agreement_kl").compute(predictions=streams(model, batches)[1].numpy(), references=logits.numpy())["kl"]
            for model in islice(hybrids(dense, repaired), EVERY - 1, None, EVERY)
        ]
        errors = [float((a - b).square().sum() / b.square().sum()) for a, b in zip(got, want, strict=True)]
        found[name] = {STREAM: errors, KL: near}
    return found


def records(file: Path = RESULTS / "by_block.jsonl") -> list[Record]:
    """What was measured, in the order of the rules."""
    kept = ResultFile(file).records
    return [record for rule in COMPARED for record in kept if matches(record, {"rule": rule})]


def draw() -> Figure:
    """Both numbers against the block, by kind of text: a line per rule."""
    found = records()
    keeps = sorted({record["keep"] for record in found}, reverse=True)
    figure = Figure(figsize=(13, 3.2 * len(keeps)), layout="constrained")
    panels = [(number, text) for number in (STREAM, KL) for text in MEASURED_ON.values()]
    for row, keep in zip(figure.subplots(len(keeps), len(panels), squeeze=False), keeps, strict=True):
        for axes, (number, text) in zip(row, panels, strict=True):
            for record in (record for record in found if record["keep"] == keep):
                values = record[text][number]
                style: dict[str, Any] = FRONT if record["rule"] in OURS else OTHERS
                step = len(record[text][STREAM]) // len(values)
                axes.plot(range(step, step * len(values) + 1, step), values, label=LABELS[record["rule"]], **style)
            axes.set(title=f"{number}\n{text}, {keep:.0%} kept", xlabel="repaired blocks")
            axes.set_yscale("log" if number == STREAM else "linear")
            axes.grid(alpha=0.3)
        row[0].legend(fontsize="small", frameon=False)
    return figure


def rows(found: Sequence[Record]) -> list[list[str]]:
    """The numbers after the last block."""
    return [
        [
            f"{record['keep']:.0%}",
            LABELS[record["rule"]],
            *(f"{record[text][n][-1]:.3f}" for text in MEASURED_ON.values() for n in (STREAM, KL)),
        ]
        for record in found
    ]


def main() -> None:
    """Measure what is missing, print the numbers after the last block."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or name of a causal language model")
    parser.add_argument("--data-dir", type=Path, help="folder of the data; the hub if left out")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.5])
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    bench, file = Bench(TASKS[TASK], arguments.model, arguments.data_dir), ResultFile(RESULTS / "by_block.jsonl")
    for keep in arguments.keep:
        setting = Setting(TASK, Path(arguments.model).name, "reconstruction", 0, CALIBRATED_ON, keep, TOKENS)
        shared = SharedInputs(bench, setting)
        for rule in COMPARED:
            key = {"model": setting.model, "source": CALIBRATED_ON, "keep": keep, "tokens": TOKENS, "rule": rule}
            file.get_or_run(key, partial(measure, shared, rule))
    headings = ("kept", "rule", *(f"{text}: {n}" for text in MEASURED_ON.values() for n in (STREAM, KL)))
    show(headings, rows(records()), width=140)


if __name__ == "__main__":
    main()
