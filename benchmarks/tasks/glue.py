"""Fine-tuned sequence classifiers (`--model FOLDER`, one per task) on the dev split of their GLUE task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from benchmarks.metrics import metric
from benchmarks.tasks.table import Predictions, Task, Text, read

MAX_LENGTH = 128
BATCH = 64


@dataclass(frozen=True)
class Glue:
    """Where the texts of a GLUE task are, and how many of the dev examples are looked at (None: all)."""

    train: str
    dev: str
    columns: tuple[str, ...]
    regression: bool = False
    examples: int | None = None

    def texts(self, data_dir: Path, file: str) -> list[Text]:
        """The texts of a file, pairs as pairs."""
        columns = [read(data_dir, file)[name] for name in self.columns]
        return list(columns[0]) if len(columns) == 1 else list(zip(*columns, strict=True))

    def labels(self, data_dir: Path) -> list[float]:
        """The labels of the dev examples that are looked at."""
        return list(read(data_dir, self.dev)["label"])[: self.examples]


def load(folder: str | None) -> tuple[PreTrainedModel, Any]:
    """A fine-tuned classifier; the classes must be numbered as the task's labels are."""
    if folder is None:
        raise SystemExit("this task needs --model FOLDER: a sequence classifier fine-tuned on it (see finetune.py)")
    return AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def predict(model: nn.Module, tokenizer: Any, data_dir: Path, *, glue: Glue) -> Predictions:
    """Logits of the dev examples in the order of the file: [examples, labels]."""
    texts = glue.texts(data_dir, glue.dev)[: glue.examples]
    rows = [tokenizer(*([text] if isinstance(text, str) else text), truncation=True, max_length=MAX_LENGTH) for text in texts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    logits: dict[int, Tensor] = {}
    for start in tqdm(range(0, len(rows), BATCH), desc="dev", leave=False):
        part = order[start : start + BATCH]
        batch = tokenizer.pad([rows[i] for i in part], return_tensors="pt").to(next(model.parameters()).device)
        logits |= dict(zip(part, model(**batch).logits.float().cpu(), strict=True))
    return {"logits": torch.stack([logits[i] for i in range(len(rows))])}


def score(predictions: Predictions, dense: Predictions, data_dir: Path, *, glue: Glue) -> dict[str, float]:
    """The task's metric, how far the predictions are from the dense model's, and the number of examples."""
    logits, labels = predictions["logits"], glue.labels(data_dir)
    if glue.regression:
        predicted = logits[:, 0].tolist()
        own = metric("spearman").compute(predictions=predicted, references=labels)
        near = {"squared_difference": float((logits - dense["logits"]).square().mean())}
    else:
        predicted = logits.argmax(1).tolist()
        own = metric("accuracy").compute(predictions=predicted, references=labels)
        near = metric("agreement_kl").compute(predictions=logits.numpy(), references=dense["logits"].numpy())
    return {**own, **near, "examples": len(labels)}


def task(name: str, glue: Glue) -> Task:
    """A row of the table of tasks."""
    metrics: Mapping[str, bool] = {"accuracy": True, "kl": False, "agreement": True}
    if glue.regression:
        metrics = {"spearman": True, "squared_difference": False}
    return Task(
        name=f"glue-{name}",
        metrics=metrics,
        load=load,
        own=partial(glue.texts, file=glue.train),
        predict=partial(predict, glue=glue),
        score=partial(score, glue=glue),
        max_length=MAX_LENGTH,
    )


GLUE = {
    "sst2": Glue("sst2/train.jsonl.gz", "sst2/dev.jsonl.gz", ("sentence",)),
    "mrpc": Glue("mrpc/train.jsonl.gz", "mrpc/dev.jsonl.gz", ("sentence1", "sentence2")),
    "stsb": Glue("stsb/train.jsonl.gz", "stsb/dev.jsonl.gz", ("sentence1", "sentence2"), regression=True),
    # Its dev split is long: the first 1,000 examples, as `examples` in the results says.
    "qnli": Glue("qnli/train_part.jsonl.gz", "qnli/dev.jsonl.gz", ("question", "sentence"), examples=1000),
}
GLUE_TASKS = tuple(task(name, glue) for name, glue in GLUE.items())
