"""SQuAD v1.1: a model with a question-answering head, every rule on the same masks.

    python -m benchmarks.finetune --task squad --model MINILM --data-dir DATA --learning-rate 1e-4 --out FIRST
    python -m benchmarks.finetune --task squad --model FIRST --data-dir DATA --learning-rate 5e-5 --out SQUAD
    python -m benchmarks.squad --model SQUAD --data-dir DATA
    python -m benchmarks.squad --task squad-every-4 --model SQUAD --data-dir DATA --keep 0.5
    python -m benchmarks.squad --model deepset/minilm-uncased-squad2

Without `--data-dir`, data comes from the Hugging Face hub, with its official splits; a data folder has ten articles to evaluate
on and the others to learn from. `squad-every-4` asks every fourth of the questions. Runs that are in results/grid are skipped,
so what was stopped goes on.
"""

from __future__ import annotations

from benchmarks.baselines import CLOSED_FORM
from benchmarks.grid import command
from benchmarks.run_keys import Cells
from benchmarks.tasks.squad import SQUAD_TASKS

# A paragraph of 150 tokens has one answer, so the selection needs more of them than where every token has an output.
TOKENS = (64_000,)
MORE_TOKENS = (192_000,)
PLAN = (
    Cells("reconstruction", CLOSED_FORM, keeps=(0.7, 0.5, 0.3), tokens=TOKENS, seeds=(0, 1)),
    # What more text brings, and what is possible at all: a repair that has seen the text it is evaluated on.
    Cells("reconstruction", ("ours",), keeps=(0.5, 0.3), sources=("own", "evaluated"), tokens=MORE_TOKENS),
)

if __name__ == "__main__":
    command(__doc__, {task.name: task for task in SQUAD_TASKS}, PLAN, default=("squad",))
