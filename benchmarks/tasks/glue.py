"""Fine-tuned sequence classifiers (`--model FOLDER`, one per task) on the dev split of their GLUE task."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from benchmarks.data import read
from benchmarks.metrics import metric
from benchmarks.tasks.table import Predictions, Task, Text, load_from, without

MAX_LENGTH = 128
BATCH = 64


@dataclass(frozen=True)
class Glue:
    """A GLUE task.

    Attributes:
        task: as in the names of its splits.
        columns: of its texts.
        metric: of GLUE's for this task: accuracy, matthews, or spearman where labels are numbers.
        dev: the split that is evaluated on.
        examples: how many of it are looked at, None: all.
    """

    task: str
    columns: tuple[str, ...]
    metric: str = "accuracy"
    dev: str = "dev"
    examples: int | None = None

    @property
    def is_regression(self) -> bool:
        """Whether labels are numbers, not classes."""
        return self.metric == "spearman"

    def texts(self, data_dir: Path | None, split: str) -> list[Text]:
        """The texts of a split, pairs as pairs."""
        columns = [read(data_dir, f"{self.task}/{split}")[name] for name in self.columns]
        return list(columns[0]) if len(columns) == 1 else list(zip(*columns, strict=True))

    def own(self, data_dir: Path | None) -> list[Text]:
        """The texts of the train split, less those that are evaluated on."""
        return without(self.texts(data_dir, "train"), self.texts(data_dir, self.dev))

    def evaluated(self, data_dir: Path | None) -> list[Text]:
        """The texts that are evaluated on."""
        return self.texts(data_dir, self.dev)[: self.examples]

    def predicted(self, predictions: Predictions) -> numpy.ndarray:
        """The class or number of every example: [examples]."""
        logits = predictions["logits"]
        return (logits[:, 0] if self.is_regression else logits.argmax(1)).numpy()

    def labels(self, data_dir: Path | None) -> list[float]:
        """The labels of the dev examples that are looked at."""
        return list(read(data_dir, f"{self.task}/{self.dev}")["label"])[: self.examples]


def load(folder: str | None) -> tuple[PreTrainedModel, Any]:
    """A fine-tuned classifier; the classes must be numbered as the task's labels are."""
    what = "a sequence classifier fine-tuned on it (see finetune.py)"
    return load_from(folder, AutoModelForSequenceClassification, what)


@torch.inference_mode()
def predict(model: nn.Module, tokenizer: Any, data_dir: Path | None, *, glue: Glue) -> Predictions:
    """Logits of the dev examples in the order of the file: [examples, labels]."""
    texts = glue.evaluated(data_dir)
    rows = [tokenizer(*([text] if isinstance(text, str) else text), truncation=True, max_length=MAX_LENGTH) for text in texts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    logits: dict[int, Tensor] = {}
    for start in tqdm(range(0, len(rows), BATCH), desc="dev", leave=False):
        part = order[start : start + BATCH]
        batch = tokenizer.pad([rows[i] for i in part], return_tensors="pt").to(next(model.parameters()).device)
        logits |= dict(zip(part, model(**batch).logits.float().cpu(), strict=True))
    return {"logits": torch.stack([logits[i] for i in range(len(rows))])}


def score(predictions: Predictions, dense: Predictions, data_dir: Path | None, *, glue: Glue) -> dict[str, float]:
    """The task's metric, how far the predictions are from the dense model's, and the number of examples."""
    logits, labels = predictions["logits"], glue.labels(data_dir)
    own = metric(glue.metric).compute(predictions=glue.predicted(predictions).tolist(), references=labels)
    if glue.is_regression:
        near = {"squared_difference": float((logits - dense["logits"]).square().mean())}
    else:
        near = metric("agreement_kl").compute(predictions=logits.numpy(), references=dense["logits"].numpy())
    return {**own, **near, "examples": len(labels)}


def examples(predictions: Predictions, data_dir: Path | None, *, glue: Glue) -> numpy.ndarray:
    """Whether each class is right, [examples, 1]; for other metrics class or place of prediction and label, [examples, 2]."""
    predicted, labels = glue.predicted(predictions), numpy.asarray(glue.labels(data_dir))
    if glue.metric == "accuracy":
        correct: numpy.ndarray = numpy.equal(predicted, labels)
        return correct[:, None]
    columns = (predicted, labels)
    return numpy.stack([rankdata(column, "dense") for column in columns] if glue.is_regression else columns, 1)


def task(name: str, glue: Glue) -> Task:
    """A row of the table of tasks."""
    near = {"squared_difference": False} if glue.is_regression else {"kl": False, "agreement": True}
    return Task(
        name=f"glue-{name}",
        metrics={glue.metric: True, **near},
        load=load,
        own=glue.own,
        predict=partial(predict, glue=glue),
        score=partial(score, glue=glue),
        max_length=MAX_LENGTH,
        examples=partial(examples, glue=glue),
        evaluated=glue.evaluated,
    )


PAIR = ("sentence1", "sentence2")
GLUE = {
    "cola": Glue("cola", ("sentence",), "matthews"),
    "sst2": Glue("sst2", ("sentence",)),
    "mrpc": Glue("mrpc", PAIR),
    "qqp": Glue("qqp", ("question1", "question2")),
    "stsb": Glue("stsb", PAIR, "spearman"),
    "mnli": Glue("mnli", ("premise", "hypothesis"), dev="dev-matched"),
    "mnli-mm": Glue("mnli", ("premise", "hypothesis"), dev="dev-mismatched"),
    # Its dev split is long: the first 1,000 examples, as `examples` in the results says.
    "qnli": Glue("qnli", ("question", "sentence"), examples=1000),
    "rte": Glue("rte", PAIR),
    "wnli": Glue("wnli", PAIR),
}
GLUE_TASKS = tuple(task(name, glue) for name, glue in GLUE.items())
