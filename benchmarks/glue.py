"""GLUE: fine-tuned encoders, every rule on the same masks, two samples of the calibration texts.

    python -m benchmarks.glue --model 'MODELS/glue-{task}' --data-dir DATA
    python -m benchmarks.glue --task cola rte --model 'textattack/bert-base-uncased-{task}'
    python -m benchmarks.glue --task sst2 --model SST2 --data-dir DATA --keep 0.5 --hours 0.5

Without `--data-dir`, data comes from the Hugging Face hub; models may come from there too. They must number their classes as
GLUE does; `benchmarks.finetune` makes them. The cells are in order of their worth; runs that are in results/grid are skipped,
so what was stopped goes on.
"""

from __future__ import annotations

from benchmarks.baselines import CLOSED_FORM
from benchmarks.grid import command
from benchmarks.run_keys import Cells
from benchmarks.tasks import TASKS
from benchmarks.tasks.glue import GLUE

KEEPS = (0.5, 0.3)
PLAN = (
    Cells("reconstruction", CLOSED_FORM, KEEPS, seeds=(0, 1)),
    # Whole published methods: a selection, and the repair that its authors follow it with.
    Cells("kprune", ("kprune", "ours"), KEEPS, seeds=(0, 1)),
    Cells("kwon", ("mask_tuning", "ours"), KEEPS, seeds=(0, 1)),
)

if __name__ == "__main__":
    command(__doc__, {name: TASKS[f"glue-{name}"] for name in GLUE}, PLAN, default=("sst2", "mrpc", "stsb", "qnli"))
