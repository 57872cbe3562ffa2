"""A fine-tuned classifier for the GLUE tasks of the grid, made with transformers' Trainer.

    python -m benchmarks.finetune --task sst2 --model bert-base-uncased --data-dir DATA --out SST2
    python -m benchmarks.grid --task glue-sst2 --model SST2 --data-dir DATA --keep 0.5

OUT is an ordinary Hugging Face folder with the tokenizer in it. Needs `accelerate`.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from benchmarks.tasks import TASKS, read
from benchmarks.tasks.glue import GLUE, MAX_LENGTH, Glue

logger = logging.getLogger(__name__)


def encoded(glue: Glue, data_dir: Path, tokenizer: Any) -> Dataset:
    """The train split as Trainer takes it: token ids (pairs as pairs) and `labels`."""
    rows = read(data_dir, glue.train)

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        columns = [batch[name] for name in glue.columns]
        labels = [float(label) for label in batch["label"]] if glue.regression else batch["label"]
        return {**tokenizer(*columns, truncation=True, max_length=MAX_LENGTH), "labels": labels}

    return rows.map(encode, batched=True, remove_columns=rows.column_names)


def finetuned(glue: Glue, arguments: argparse.Namespace) -> tuple[Any, Any]:
    """(model, tokenizer) after training; nothing is written but the end result."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    data = encoded(glue, arguments.data_dir, tokenizer)
    classes = 1 if glue.regression else len(set(data["labels"]))
    model = AutoModelForSequenceClassification.from_pretrained(arguments.model, num_labels=classes)
    options = TrainingArguments(
        output_dir=str(arguments.out),
        num_train_epochs=arguments.epochs,
        max_steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        per_device_train_batch_size=arguments.batch_size,
        warmup_steps=0.1,
        seed=arguments.seed,
        save_strategy="no",
        report_to="none",
        logging_steps=50,
    )
    Trainer(model, options, DataCollatorWithPadding(tokenizer), data).train()
    return model, tokenizer


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(GLUE), required=True)
    parser.add_argument("--model", required=True, help="folder, or name on the hub")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder that is written; it must not exist")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--steps", type=int, default=-1, help="stop after so many steps, whatever the epochs")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"--out {arguments.out} exists already: choose another folder")
    return arguments


def main() -> None:
    """Train, save, and say how good it is on dev."""
    arguments = parsed()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model, tokenizer = finetuned(GLUE[arguments.task], arguments)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    task = TASKS[f"glue-{arguments.task}"]
    model.train(False)
    predictions = task.predict(model, tokenizer, arguments.data_dir)
    metric = next(iter(task.metrics))
    score = task.score(predictions, predictions, arguments.data_dir)[metric]
    logger.info("%s on dev: %.4f, saved in %s", metric, score, arguments.out)


if __name__ == "__main__":
    main()
