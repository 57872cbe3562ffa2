"""One run of the studies of gradient reconstruction: what is removed, where training starts, what is trained on which texts.

`rethinking.py`, `free_lunch.py` and `starts.py` say which runs their tables are made of.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import liar
from benchmarks.bench import Bench
from benchmarks.metrics import metric
from benchmarks.results import RESULTS, Record, ResultFile
from benchmarks.selections import SELECTIONS
from benchmarks.speed import growth_of_memory
from benchmarks.tasks import TASKS
from benchmarks.tasks.causal import evaluated as stories
from benchmarks.tasks.wikitext import joined, losses_of
from liar.models import layout_of
from liar.options import RefineOptions
from liar.repair.refine import HeldOut, hold_out, last_hidden_error, refine_windows, windows_of

# Texts that language models are evaluated on: each is out of domain for the other.
DOMAINS: dict[str, Callable[[Path | None], str]] = {
    "tinystories": lambda data_dir: "\n\n".join(stories(data_dir)),
    "wikitext": lambda data_dir: joined(data_dir, "test"),
}


@dataclass(frozen=True)
class Scale:
    """How large the runs on one model are.

    Attributes:
        task: whose texts are calibrated on.
        length: tokens of a sequence, of calibration and of evaluation.
        tokens: of calibration.
        evaluated: tokens of each domain that perplexities are measured on, and of the texts that errors are measured on.
        seeds: samples of the calibration texts.
        blocks: of so many first blocks single weights are removed, and they alone are trained; None for all.
    """

    task: str
    length: int
    tokens: int
    evaluated: int
    seeds: Sequence[int]
    blocks: int | None = None


@dataclass(frozen=True)
class Run:
    """What tells one run from another.

    Attributes:
        removed: `"weights"` or `"units"`.
        criterion: what chooses them: of `liar.unstructured`, or of `benchmarks.selections`.
        keep: share that stays, or a pattern such as `"2:4"`.
        start: `"mask"`: from the weights as they are; `"closed form"`: after `liar.reconstruct` (units), or SparseGPT's update.
        granularity: of `liar.refine`; None for no training at all.
        propagation: of `liar.refine`.
        epochs: passes over the texts.
        sequences: in a step.
        learning_rate: the largest.
        warmup: share of the steps.
        select: whether the best weights on held-out sequences are kept, as the library does; else the last, as in the studies.
        texts: `"own"`; for the training alone `"own + self"`, with as many tokens that the dense model wrote, or `"own + own"`,
            with as many more of the task.
        seed: sample of the calibration texts.
    """

    removed: str
    criterion: str
    keep: float | str
    start: str = "mask"
    granularity: int | str | None = None
    propagation: str = "global"
    epochs: int = 10
    sequences: int = 8
    learning_rate: float = 2e-4
    warmup: float = 0.0
    select: bool = False
    texts: str = "own"
    seed: int = 0

    def options(self) -> RefineOptions:
        """For the library."""
        assert self.granularity is not None
        names = ("granularity", "propagation", "epochs", "sequences", "learning_rate", "warmup")
        return RefineOptions(**{name: getattr(self, name) for name in names})


class Study:
    """A dense model with what its runs share."""

    def __init__(self, folder: str | None, data_dir: Path | None, scale: Scale) -> None:
        self.bench, self.scale = Bench(TASKS[scale.task], folder, data_dir), scale
        self._pruned: dict[tuple[Any, ...], nn.Module] = {}
        self._unseen_energy: float | None = None
        self._batches: dict[tuple[int, str], list[dict[str, Tensor]]] = {}

    @property
    def dense(self) -> nn.Module:
        """The dense model."""
        model: nn.Module = self.bench.loaded[0]
        return model

    def batches(self, texts: Sequence[Any], tokens: int) -> list[dict[str, Tensor]]:
        """Texts as batches: full sequences for language models."""
        task = self.bench.task
        causal = task.name != "stsb"
        length = {"max_length": self.scale.length, "pack": causal}
        return liar.calibration(texts, self.bench.loaded[1], tokens=tokens, **length, progress=False)  # type: ignore[arg-type]

    def calibration(self, seed: int, texts: str = "own") -> list[dict[str, Tensor]]:
        """What is calibrated on."""
        if (seed, texts) not in self._batches:
            own = partial(self.bench.task.texts, self.bench.data_dir, "own", seed)
            made = {
                "own": lambda: self.batches(own(), self.scale.tokens),
                "own + own": lambda: self.batches(own(), 2 * self.scale.tokens),
                "own + self": lambda: self.calibration(seed) + self.batches(self._written(seed), self.scale.tokens),
            }
            self._batches[seed, texts] = made[texts]()
        return self._batches[seed, texts]

    def _written(self, seed: int) -> Sequence[str]:
        """Texts that the dense model writes."""
        (model, tokenizer), scale = self.bench.loaded, self.scale
        found = liar.self_generate(model, tokenizer, tokens=scale.tokens, max_length=scale.length, seed=seed, progress=False)
        return found.texts

    @cached_property
    def unseen(self) -> HeldOut:
        """Texts of the same domain that nothing is calibrated on, to measure errors on."""
        task = self.bench.task
        assert task.evaluated is not None or task.name.startswith("wikitext")
        texts = task.evaluated(self.bench.data_dir) if task.evaluated else [joined(self.bench.data_dir, "test")]
        return only(self.batches(texts, self.scale.evaluated), self.dense)

    def pruned(self, run: Run) -> nn.Module:
        """A copy of the model, pruned, before any training."""
        key = (run.removed, run.criterion, run.keep, run.start, run.seed)
        if key not in self._pruned:
            self._pruned = {key: self._prune(run)}
        return copy.deepcopy(self._pruned[key])

    def _prune(self, run: Run) -> nn.Module:
        model, calibration = copy.deepcopy(self.dense), self.calibration(run.seed)
        if run.removed == "weights":
            liar.unstructured.prune(model, calibration, sparsity=_sparsity(run.keep), criterion=run.criterion, progress=False)
            self._put_back(model)
            return model
        mask = SELECTIONS[run.criterion](model, calibration, float(run.keep), run.seed)
        if run.start == "closed form":
            liar.reconstruct(model, mask, calibration, progress=False)
        else:
            liar.remove(model, mask)
        return model

    def _put_back(self, model: nn.Module) -> None:
        """Give the blocks that are to stay dense their weights again."""
        for name in layout_of(model).blocks[self._dense_blocks(model)]:
            model.get_submodule(name).load_state_dict(self.dense.get_submodule(name).state_dict())

    def _dense_blocks(self, model: nn.Module) -> slice:
        """The blocks that stay dense."""
        return slice(len(layout_of(model).blocks) if self.scale.blocks is None else self.scale.blocks, None)

    def measure(self, run: Run) -> Record:
        """Prune, train, and score."""
        model = self.pruned(run)
        calibration = self.calibration(run.seed, run.texts)
        trained: dict[str, Any] = {"seconds": 0.0, "grown_mb": 0.0, "steps": 0}
        if run.granularity is not None:
            trained = self._train(model, run, calibration)
        return {**trained, **self.errors(model, calibration), **self.scores(model)}

    def _train(self, model: nn.Module, run: Run, calibration: list[dict[str, Tensor]]) -> Record:
        whole = liar.Calibration.of(calibration, model)
        data = hold_out(whole, run.sequences) if run.select else everything(calibration, model, run.sequences)
        layouts = layout_of(model), layout_of(self.dense)
        first_dense = self._dense_blocks(model).start
        pairs = (model, layouts[0], self.dense, layouts[1])
        windows = [each for each in windows_of(*pairs, run.options().granularity) if each.stop <= first_dense]
        found: list[Any] = []

        def work() -> None:
            found.append(refine_windows(*pairs, data, run.options(), windows=windows, select=run.select))
            found[0].write(model)

        # What earlier runs have freed would be used again, and not counted.
        ctypes.CDLL(None).malloc_trim(0)
        began = time.perf_counter()
        grown = growth_of_memory(work)
        seconds = time.perf_counter() - began
        steps = sum(len(outcome.course.losses) for outcome in found[0].outcomes)
        return {"seconds": seconds, "grown_mb": grown / 1e6, "steps": steps}

    def errors(self, model: nn.Module, calibration: list[dict[str, Tensor]]) -> Record:
        """Error of the last hidden states over their energy, on what was calibrated on and on other texts of the domain."""
        parts = {"calibration_error": only(calibration, self.dense), "unseen_error": self.unseen}
        return {name: last_hidden_error(model, self.dense, data) / self._energy(data) for name, data in parts.items()}

    def _energy(self, data: HeldOut) -> float:
        """Of the unseen texts it is always the same."""
        if data is not self.unseen:
            return energy(self.dense, data)
        if self._unseen_energy is None:
            self._unseen_energy = energy(self.dense, data)
        return self._unseen_energy

    def scores(self, model: nn.Module) -> Record:
        """Perplexity in both domains; of an encoder its task's numbers."""
        if self.bench.task.name == "stsb":
            numbers = self.bench.score(model)
            return {name: numbers[name] for name in self.bench.task.metrics}
        return {f"perplexity_{name}": self._perplexity(model, name) for name in DOMAINS}

    def _perplexity(self, model: nn.Module, domain: str) -> float:
        text, tokenizer = DOMAINS[domain](self.bench.data_dir), self.bench.loaded[1]
        found = losses_of(model, tokenizer, text, length=self.scale.length, tokens=self.scale.evaluated)
        result: float = metric("perplexity").compute(predictions=found["loss"].tolist(), references=found["tokens"].tolist())[
            "perplexity"
        ]
        return result


def _sparsity(keep: float | str) -> float | str:
    return keep if isinstance(keep, str) else 1 - keep


def only(batches: list[dict[str, Tensor]], model: nn.Module) -> HeldOut:
    """Batches that are measured on alone."""
    calibration = liar.Calibration.of(batches, model)
    return HeldOut(calibration, range(0), range(len(calibration.batches)))


def everything(batches: list[dict[str, Tensor]], model: nn.Module, sequences: int) -> HeldOut:
    """All sequences to train on, and the first of them to look at: as in the studies, nothing is held out."""
    calibration = liar.data.split(liar.Calibration.of(batches, model), sequences)
    return HeldOut(calibration, range(len(calibration.batches)), range(1))


def energy(model: nn.Module, data: HeldOut) -> float:
    """Mean square of a model's last hidden states, on what is held out."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for number in data.held_out:
            batch, mask = data.calibration.batches[number], data.calibration.token_masks[number]
            rows = model.base_model(**batch)[0][mask].double()  # type: ignore[operator]
            total, count = total + float(rows.square().sum()), count + rows.numel()
    return total / count


def entries(run: Run, scale: Scale, model: str) -> dict[str, Any]:
    """The entries of its record that no other run shares."""
    size = {} if scale.blocks is None else {"blocks": scale.blocks}
    return {"task": scale.task, "model": model, "tokens": scale.tokens, "length": scale.length, **size, **asdict(run)}


def run_plan(study: Study, model: str, runs: Sequence[Run], file: ResultFile, until: float = inf) -> list[Record]:
    """Run what is missing of a plan; the records of all that is there by then."""
    records = []
    missing = [run for run in runs if file.find(**entries(run, study.scale, model)) is None]
    with logging_redirect_tqdm(), tqdm(total=len(missing), unit="run", smoothing=0.1) as bar:
        for run in runs:
            key = entries(run, study.scale, model)
            if time.monotonic() > until and file.find(**key) is None:
                continue
            known = len(file.records)
            records.append(file.get_or_run(key, partial(study.measure, run)))
            bar.update(len(file.records) - known)
    return records


def by_seed(scale: Scale, runs: Sequence[Run]) -> Iterator[Run]:
    """The runs of a plan for every seed: one seed of everything before the next."""
    for seed in scale.seeds:
        for run in runs:
            yield replace(run, seed=seed)


def command(description: str | None, name: str, scales: Mapping[str, Scale], plans: Mapping[str, Sequence[Run]]) -> None:
    """A command that runs the plan of one model, and says where the results are."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=list(scales), required=True, help="which model the plan is for")
    parser.add_argument("--model", help="folder of the model; all-MiniLM-L6-v2 if left out (scale minilm)")
    parser.add_argument("--data-dir", type=Path, help="folder of the data; the Hugging Face hub if left out")
    parser.add_argument("--hours", type=float, default=inf, help="begin no run after so many hours; call again to go on")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the plan only these samples of texts")
    parser.add_argument("--only", nargs="+", default=(), help="of the plan only runs with NAME=VALUE, such as texts=own")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    scale = scales[arguments.scale]
    if arguments.seeds:
        scale = replace(scale, seeds=arguments.seeds)
    wanted = dict(pair.split("=") for pair in arguments.only)
    runs = [
        run
        for run in by_seed(scale, plans[arguments.scale])
        if all(str(getattr(run, name)) == value for name, value in wanted.items())
    ]
    study = Study(arguments.model, arguments.data_dir, scale)
    until = time.monotonic() + 3600 * arguments.hours
    run_plan(study, arguments.scale, runs, ResultFile(RESULTS / f"{name}.jsonl"), until)
