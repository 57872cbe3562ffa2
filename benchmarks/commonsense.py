"""Common-sense reasoning of a causal language model by EleutherAI's harness, zero-shot, for the rules that matter.

    python -m benchmarks.commonsense --model SMOLLM2 --data-dir DATA
    python -m benchmarks.commonsense --task commonsense --model meta-llama/Llama-2-7b-hf --keep 0.8

The number is the mean accuracy over BoolQ, PIQA, HellaSwag, WinoGrande, ARC (easy and challenge) and OpenBookQA, by
length-normalised likelihood where the harness has that; records have all accuracies of each. A task's name says how many
examples of each are asked where these are not all. Without `--data-dir`, data comes from the Hugging Face hub. Calibrated on
WikiText-2. Runs that are in results/grid are skipped, so what was stopped goes on.
"""

from __future__ import annotations

from benchmarks.grid import command
from benchmarks.run_keys import Cells
from benchmarks.tasks.commonsense import COMMONSENSE_TASKS

PLAN = (Cells("reconstruction", ("mask_only", "liar", "grail", "osscar", "ours"), keeps=(0.8, 0.5), tokens=(8_192,)),)

if __name__ == "__main__":
    command(
        __doc__,
        {task.name: task for task in COMMONSENSE_TASKS},
        PLAN,
        default=("commonsense-first-200",),
    )
