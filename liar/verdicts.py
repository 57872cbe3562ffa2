"""How the repair of one site can end."""

from __future__ import annotations

from enum import Enum


class Verdict(str, Enum):
    """How the repair of one site ended. The value is a short name; `text` explains it.

    Example:
        >>> Verdict.RANK_DEFICIENT.text
        'the kept channels are linearly dependent on this data: minimum-norm change of the kept weights'
    """

    OK = "ok"
    RIDGED = "ridged"
    RANK_DEFICIENT = "rank_deficient"
    TOO_FEW_TOKENS = "too_few_tokens"
    KEPT_BASELINE = "kept_baseline"
    NOTHING_HELD_OUT = "nothing_held_out"
    UNTOUCHED = "untouched"
    REFINED = "refined"
    UNDONE = "undone"

    @property
    def text(self) -> str:
        """One sentence for people."""
        return _TEXTS[self]


_TEXTS = {
    Verdict.OK: "plain least squares",
    Verdict.RIDGED: "least squares with a ridge toward the kept weights",
    Verdict.RANK_DEFICIENT: "the kept channels are linearly dependent on this data: minimum-norm change of the kept weights",
    Verdict.TOO_FEW_TOKENS: "too little text (at least 64 tokens, in post-norm models two for every kept channel): the kept "
    "weights stay, or, where there is a ridge, the result depends mostly on it; use more text",
    Verdict.KEPT_BASELINE: "no update was better on held-out tokens: the kept weights stay, at most the bias moves",
    Verdict.NOTHING_HELD_OUT: "too little text to hold some of it out (copies count once), so no update could be tested: the "
    "kept weights stay; use more text",
    Verdict.UNTOUCHED: "everything is kept and nothing before it changed: the layer stays as it is",
    Verdict.REFINED: "gradient descent: the weights with the smallest error on held-out sequences",
    Verdict.UNDONE: "better by itself on held-out sequences, but the model's last hidden states were not: all weights "
    "are as they were",
}
