"""A fine-tuned model for the GLUE and SQuAD tasks of the grid, made with transformers' Trainer.

    python -m benchmarks.finetune --task sst2 --model bert-base-uncased --out SST2
    python -m benchmarks.finetune --task squad --model MINILM --data-dir DATA --learning-rate 1e-4 --out SQUAD
    python -m benchmarks.glue --task sst2 --model SST2

OUT is an ordinary Hugging Face folder with the tokenizer in it. Needs `accelerate`. Training that was killed goes on from the
last of its checkpoints, which are in OUT.part.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from benchmarks.data import read
from benchmarks.tasks import TASKS
from benchmarks.tasks.glue import GLUE, MAX_LENGTH, Glue
from benchmarks.tasks.squad import pieces

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How to learn a task.

    Attributes:
        task: its name in the grid.
        rows: (data folder, tokenizer) -> token ids and labels, as Trainer takes them.
        model: (folder or name, rows) -> a model with a head for the task.
    """

    task: str
    rows: Callable[[Path | None, Any], Dataset]
    model: Callable[[str, Dataset], PreTrainedModel]


def classified(data_dir: Path | None, tokenizer: Any, glue: Glue) -> Dataset:
    """The train split of a GLUE task: token ids (pairs as pairs) and `labels`."""
    rows = read(data_dir, f"{glue.task}/train")

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        columns = [batch[name] for name in glue.columns]
        labels = [float(label) for label in batch["label"]] if glue.is_regression else batch["label"]
        return {**tokenizer(*columns, truncation=True, max_length=MAX_LENGTH), "labels": labels}

    return rows.map(encode, batched=True, remove_columns=rows.column_names)


def classifier(model: str, rows: Dataset, glue: Glue) -> PreTrainedModel:
    """With an output per class, or with one."""
    classes = 1 if glue.is_regression else len(set(rows["labels"]))
    made: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(model, num_labels=classes)
    return made


def answered(data_dir: Path | None, tokenizer: Any) -> Dataset:
    """The train split of SQuAD: token ids, and the places of the first and last token of the first answer.

    Both are that of the first token (CLS) where a piece of a long paragraph does not have the whole answer.
    """
    rows = read(data_dir, "squad/train")

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = pieces(tokenizer, batch)
        places = []
        for number, offsets in enumerate(encoded["offset_mapping"]):
            answer = batch["answers"][encoded["overflow_to_sample_mapping"][number]]
            begin = answer["answer_start"][0]
            places.append(token_span(offsets, encoded.sequence_ids(number), begin, begin + len(answer["text"][0])))
        inputs = {name: encoded[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in encoded}
        return {**inputs, "start_positions": [one for one, _ in places], "end_positions": [other for _, other in places]}

    return rows.map(encode, batched=True, remove_columns=rows.column_names)


def token_span(offsets: list[tuple[int, int]], sequence_ids: list[int | None], begin: int, end: int) -> tuple[int, int]:
    """First and last token of the characters from `begin` to `end` of the paragraph; (0, 0) if not all of them are there."""
    inside = [
        number
        for number, (piece, (start, stop)) in enumerate(zip(sequence_ids, offsets, strict=True))
        if piece == 1 and start < end and stop > begin
    ]
    if not inside or offsets[inside[0]][0] > begin or offsets[inside[-1]][1] < end:
        return 0, 0
    return inside[0], inside[-1]


def answerer(model: str, _: Dataset) -> PreTrainedModel:
    """With a head for the first and the last token of an answer."""
    made: PreTrainedModel = AutoModelForQuestionAnswering.from_pretrained(model)
    return made


RECIPES = {
    **{
        name: Recipe(f"glue-{name}", partial(classified, glue=glue), partial(classifier, glue=glue))
        for name, glue in GLUE.items()
    },
    "squad": Recipe("squad", answered, answerer),
}


def finetuned(recipe: Recipe, arguments: argparse.Namespace, checkpoints: Path) -> tuple[Any, Any]:
    """(model, tokenizer) after training."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = recipe.rows(arguments.data_dir, tokenizer)
    options = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=arguments.epochs,
        max_steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        per_device_train_batch_size=arguments.batch_size,
        warmup_steps=0.1,
        train_sampling_strategy="group_by_length",
        seed=arguments.seed,
        bf16=arguments.bf16,
        use_cpu=arguments.bf16 and not torch.cuda.is_available(),
        save_steps=arguments.save_steps,
        save_total_limit=1,
        report_to="none",
        logging_steps=50,
    )
    trainer = Trainer(recipe.model(arguments.model, rows), options, DataCollatorWithPadding(tokenizer), rows)
    trainer.train(resume_from_checkpoint=any(checkpoints.glob("checkpoint-*")))
    return trainer.model, tokenizer


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(RECIPES), required=True)
    parser.add_argument("--model", required=True, help="folder, or name on the hub")
    parser.add_argument("--data-dir", type=Path, help="folder of the data; the Hugging Face hub if left out")
    parser.add_argument("--out", type=Path, required=True, help="folder that is written; it must not exist")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--steps", type=int, default=-1, help="stop after so many steps, whatever the epochs")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--save-steps", type=int, default=100, help="steps from one checkpoint to the next")
    parser.add_argument("--bf16", action="store_true", help="matrix products in bfloat16: faster where the machine has it")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"--out {arguments.out} exists already: choose another folder")
    return arguments


def main() -> None:
    """Train, save, and say how good it is on dev."""
    arguments = parsed()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    recipe, checkpoints = RECIPES[arguments.task], arguments.out.with_name(arguments.out.name + ".part")
    model, tokenizer = finetuned(recipe, arguments, checkpoints)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    shutil.rmtree(checkpoints, ignore_errors=True)
    task = TASKS[recipe.task]
    model.train(False)
    predictions = task.predict(model, tokenizer, arguments.data_dir)
    number = next(iter(task.metrics))
    score = task.score(predictions, predictions, arguments.data_dir)[number]
    logger.info("%s on dev: %.4f, saved in %s", number, score, arguments.out)


if __name__ == "__main__":
    main()
