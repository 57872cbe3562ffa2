"""What one epoch of LoRA makes of a pruned classifier: its score dense, pruned, repaired, and each after LoRA.

    python -m benchmarks.lora --task mrpc --model MRPC --data-dir DATA [--keep 0.3]

MODEL is a classifier fine-tuned on the task (see finetune.py). Masks and repairs are the library's defaults, with 16,000 tokens
of the train split, without labels. Then adapters in all linear layers, and the classifier, are trained for one epoch on the
train split with labels, less the texts that are also in dev, and merged. The mask alone gets the same training. Needs `peft`.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, TaskType, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

import liar
from benchmarks.finetune import classified
from benchmarks.results import RESULTS, Record, ResultFile
from benchmarks.tasks import TASKS
from benchmarks.tasks.glue import GLUE
from benchmarks.tasks.table import Predictions, without

TOKENS = 16_000
RANK = 8
LEARNING_RATE = 5e-4
BATCH = 16
RULES = ("mask_only", "ours")


class PrunedTask:
    """A task with its dense model, and what all rules share: calibration texts, mask, training rows."""

    def __init__(self, name: str, folder: str, data_dir: Path | None, keep: float, seed: int) -> None:
        self.glue, self.task = GLUE[name], TASKS[f"glue-{name}"]
        self.data_dir, self.keep, self.seed = data_dir, keep, seed
        self.dense, self.tokenizer = self.task.load(folder)

    @cached_property
    def calibration(self) -> list[dict[str, torch.Tensor]]:
        """Batches of the train split."""
        texts = self.task.texts(self.data_dir, "own", self.seed)
        return liar.calibration(texts, self.tokenizer, tokens=TOKENS, max_length=self.task.max_length)

    @cached_property
    def mask(self) -> liar.Mask:
        """Of the default selection."""
        return liar.select(self.dense, self.calibration, keep=self.keep)

    @cached_property
    def rows(self) -> Dataset:
        """Token ids and labels of the train split, less the texts that are also in dev."""
        texts = self.glue.texts(self.data_dir, "train")
        allowed = set(without(texts, self.glue.evaluated(self.data_dir)))
        rows = classified(self.data_dir, self.tokenizer, self.glue)
        return rows.select([number for number, text in enumerate(texts) if text in allowed])

    def predict(self, model: nn.Module) -> Predictions:
        """What a model says on dev."""
        return self.task.predict(model.eval(), self.tokenizer, self.data_dir)

    def score(self, predictions: Predictions) -> float:
        """The task's number."""
        return self.task.score(predictions, predictions, self.data_dir)[self.glue.metric]

    def measure(self, rule: str) -> Record:
        """The scores of the dense model, of the pruned one, and of that after LoRA."""
        model = copy.deepcopy(self.dense)
        if rule == "mask_only":
            liar.remove(model, self.mask)
        else:
            liar.reconstruct(model, self.mask, self.calibration)
        pruned, began = self.predict(model), time.perf_counter()
        tuned, trained = self.tuned(model)
        seconds, after = time.perf_counter() - began, self.predict(tuned)
        return {
            "metric": self.glue.metric,
            "dense": self.score(self.predict(self.dense)),
            "pruned": self.score(pruned),
            "tuned": self.score(after),
            # Equal scores need not be equal answers.
            "changed": int((self.glue.predicted(pruned) != self.glue.predicted(after)).sum()),
            "trained_parameters": trained,
            "parameters": [sum(p.numel() for p in each.parameters()) for each in (self.dense, tuned)],
            "train_examples": len(self.rows),
            "examples": len(self.glue.labels(self.data_dir)),
            "seconds": seconds,
            "lora": {"rank": RANK, "learning_rate": LEARNING_RATE, "batch_size": BATCH},
            "peft": version("peft"),
        }

    def tuned(self, model: Any) -> tuple[nn.Module, int]:
        """The model after one epoch of LoRA, with its adapters merged; and how many parameters were trained."""
        set_seed(self.seed)
        options = LoraConfig(
            task_type=TaskType.SEQ_CLS, r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules="all-linear"
        )
        adapted = get_peft_model(model, options)
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                num_train_epochs=1,
                learning_rate=LEARNING_RATE,
                per_device_train_batch_size=BATCH,
                warmup_steps=0.1,
                train_sampling_strategy="group_by_length",
                seed=self.seed,
                save_strategy="no",
                report_to="none",
                logging_steps=50,
            )
            Trainer(adapted, arguments, DataCollatorWithPadding(self.tokenizer), self.rows).train()
        merged: nn.Module = adapted.merge_and_unload()
        return merged, trained


def main() -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(GLUE), default="mrpc")
    parser.add_argument("--model", required=True, help="folder of a classifier fine-tuned on the task")
    parser.add_argument("--data-dir", type=Path, help="folder of the data; the Hugging Face hub if left out")
    parser.add_argument("--keep", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS / "lora.jsonl")
    arguments = parser.parse_args()
    file, shown = ResultFile(arguments.results), Table("rule", "dense", "pruned", "after LoRA")
    pruned = PrunedTask(arguments.task, arguments.model, arguments.data_dir, arguments.keep, arguments.seed)
    for rule in RULES:
        key = {"task": f"glue-{arguments.task}", "model": Path(arguments.model).name, "keep": arguments.keep}
        key |= {"seed": arguments.seed, "rule": rule}
        run = file.get_or_run(key, partial(pruned.measure, rule))
        shown.add_row(rule, *(f"{run[name]:.4f}" for name in ("dense", "pruned", "tuned")))
    Console(width=120).print(shown)


if __name__ == "__main__":
    main()
