"""Common-sense reasoning by EleutherAI's harness (`lm-eval`): seven tasks of several choices, without examples in the prompt.

From the hub the harness's own tasks are run. The YAML files beside this one are the same tasks over the JSON lines of a data
folder, where `DATA` stands for the folder; tasks whose file is not there are left out (WinoGrande is not in one). Other prompts
or other splits give other numbers: HellaSwag of a folder is a part of its validation split. Matrix products are in bfloat16, in
which checkpoints of language models are published; likelihoods are summed in float32.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

from benchmarks.tasks.causal import load_causal
from benchmarks.tasks.table import Predictions, Task
from benchmarks.tasks.wikitext import articles

TASK_NAMES = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
SHOTS = 0
BATCH = 16
FOLDER = Path(__file__).parent


def local_tasks(data_dir: Path, into: Path) -> list[str]:
    """The tasks whose data a folder has; their files are written with its path."""
    found = []
    for name in TASK_NAMES:
        template = FOLDER / f"{name}.yaml"
        text = template.read_text(encoding="utf-8").replace("DATA/", f"{data_dir.resolve()}/") if template.exists() else ""
        if (match := re.search(r"(?m)^ +test: (.*)$", text)) and Path(match[1]).is_file():
            (into / template.name).write_text(text, encoding="utf-8")
            found.append(name)
    if not found:
        raise SystemExit(f"{data_dir}: none of the files that {FOLDER}/*.yaml name; leave --data-dir out to read from the hub")
    return found


def predict(model: nn.Module, tokenizer: Any, data_dir: Path | None, *, limit: int | None) -> Predictions:
    """For every task and metric ("piqa acc", "piqa acc_norm") whether each answer is right: [examples], float."""
    # Imported when there is work: it takes seconds.
    evaluator, managers, models = (import_module(f"lm_eval.{name}") for name in ("evaluator", "tasks", "models.huggingface"))
    wrapped = models.HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=BATCH,
        device=str(next(model.parameters()).device),
        mixed_precision_dtype="bfloat16",
        softmax_dtype="float32",
    )
    with tempfile.TemporaryDirectory() as folder:
        names = list(TASK_NAMES) if data_dir is None else local_tasks(data_dir, Path(folder))
        manager = managers.TaskManager(**({} if data_dir is None else {"include_path": folder, "include_defaults": False}))
        try:
            found = evaluator.simple_evaluate(
                wrapped, tasks=names, task_manager=manager, num_fewshot=SHOTS, limit=limit, bootstrap_iters=0, verbosity="ERROR"
            )
        except ConnectionError as error:
            raise SystemExit(
                f"cannot read the tasks from the Hugging Face hub ({error}): go online, or pass --data-dir"
            ) from error
    right: dict[str, torch.Tensor] = {}
    for name, samples in found["samples"].items():
        samples = sorted(samples, key=lambda sample: sample["doc_id"])
        for metric in ("acc", "acc_norm"):
            if metric in samples[0]:
                right[f"{name} {metric}"] = torch.tensor([float(sample[metric]) for sample in samples])
    return right


def counted(names: Iterable[str]) -> dict[str, str]:
    """By task, which of its accuracies counts: by length-normalised likelihood; by plain likelihood for yes or no questions."""
    plain = {name.split()[0]: name for name in names if name.endswith(" acc")}
    return plain | {name.split()[0]: name for name in names if name.endswith(" acc_norm") and not name.startswith("boolq ")}


def headline(predictions: Predictions) -> dict[str, numpy.ndarray]:
    """What counts of each task: whether each answer is right."""
    return {task: predictions[name].numpy() for task, name in counted(predictions).items()}


def score(predictions: Predictions, dense: Predictions, data_dir: Path | None, *, limit: int | None) -> dict[str, Any]:
    """The mean accuracy over the tasks; of every task all its accuracies with their standard errors; shots and limit."""
    by_task = headline(predictions)
    tasks = {
        name: {"accuracy": float(right.mean()), "error": float(right.std() / len(right) ** 0.5), "examples": len(right)}
        for name, right in predictions.items()
    }
    mean = float(numpy.mean([right.mean() for right in by_task.values()]))
    return {"acc": mean, "tasks": tasks, "shots": SHOTS, "limit": limit}


def examples(predictions: Predictions, data_dir: Path | None) -> numpy.ndarray:
    """Number of the task, and whether the answer is right: [examples of all tasks, 2]."""
    parts = [
        numpy.stack([numpy.full(len(right), TASK_NAMES.index(name)), right], 1) for name, right in headline(predictions).items()
    ]
    return numpy.concatenate(parts)


def commonsense(limit: int | None) -> Task:
    """The task with the first so many examples of each of the harness's, or with all."""
    return Task(
        name="commonsense" + (f"-first-{limit}" if limit else ""),
        metrics={"acc": True},
        load=load_causal,
        own=partial(articles, split="train"),
        predict=partial(predict, limit=limit),
        score=partial(score, limit=limit),
        max_length=512,
        examples=examples,
        pack=True,
    )


COMMONSENSE_TASKS = (commonsense(200), commonsense(None))
