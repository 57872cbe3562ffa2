"""WikiText-2 perplexity of a causal language model: every rule on the same masks, and whole published methods.

    python -m benchmarks.wikitext --model SMOLLM2 --data-dir DATA
    python -m benchmarks.wikitext --task wikitext-2048 --model meta-llama/Llama-2-7b-hf --keep 0.8
    python -m benchmarks.wikitext --task wikitext-1024-stride-512 --model SMOLLM2 --data-dir DATA --keep 0.8 --rules ours

A task's name has the length of its windows, the stride where they overlap, and how much of the test text is read where that is
not all of it. Perplexities of different lengths, and of different tokenizers, cannot be compared. Without `--data-dir`, data
comes from the Hugging Face hub. The cells are in order of their worth; runs that are in results/grid are skipped, so what was
stopped goes on.
"""

from __future__ import annotations

from benchmarks.baselines import CLOSED_FORM
from benchmarks.grid import command
from benchmarks.language_models import MASKS, PIPELINES
from benchmarks.run_keys import Cells
from benchmarks.tasks.wikitext import WIKITEXT_TASKS

TOKENS = (8_192,)
MORE_TOKENS = 24_576
KEEPS = (0.8, 0.5, 0.9, 0.7)
# Selections of others, and the repairs that they are published with.
OTHERS = {
    criterion: tuple(repair for selection, repair in PIPELINES if selection == criterion)
    for criterion in MASKS
    if criterion != "reconstruction"
}
PLAN = (
    Cells("reconstruction", CLOSED_FORM, KEEPS, tokens=TOKENS),
    # Whole published methods, and our repair of their masks.
    *(Cells(criterion, (*repairs, "ours"), (0.8, 0.5), tokens=TOKENS) for criterion, repairs in OTHERS.items()),
    *(Cells(criterion, repairs, (0.9, 0.7), tokens=TOKENS) for criterion, repairs in OTHERS.items()),
    Cells("reconstruction", CLOSED_FORM, KEEPS, sources=("c4",), tokens=TOKENS),
    Cells("reconstruction", ("ours_created_bias",), (0.8, 0.5), sources=("own", "c4"), tokens=TOKENS),
    # What more calibration text brings to selection and repair together: each number of tokens has a mask of its own.
    Cells("fluctuation", ("liar", "kprune_ridge", "ours_no_refit", "ours"), (0.8,), tokens=(*TOKENS, MORE_TOKENS)),
)

if __name__ == "__main__":
    command(
        __doc__,
        {task.name: task for task in WIKITEXT_TASKS},
        PLAN,
        default=("wikitext-512-first-16384",),
    )
