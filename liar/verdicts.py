"""How the repair of one site, and of a whole model, can end."""

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


class OutputVerdict(str, Enum):
    """What a comparison of outputs says of a repair. The value is a short name; `text` explains it.

    Only `BETTER` is good news, and only text that nothing was fitted to can bring it.

    Example:
        >>> OutputVerdict.BETTER_ON_SEEN.text
        'closer to the dense model than with the mask alone, but on sequences that the weights were fitted to'
    """

    BETTER = "better"
    BETTER_ON_SEEN = "better_on_seen"
    UNCHANGED = "unchanged"
    NOT_BETTER = "not_better"

    @property
    def text(self) -> str:
        """One sentence for people."""
        return _OUTPUT_TEXTS[self]


_OUTPUT_TEXTS = {
    OutputVerdict.BETTER: "closer to the dense model than with the mask alone, on sequences that nothing was fitted to",
    OutputVerdict.BETTER_ON_SEEN: "closer to the dense model than with the mask alone, but on sequences that the weights were "
    "fitted to",
    OutputVerdict.UNCHANGED: "the mask alone changes the output by nothing that could be measured, and so does the repair",
    OutputVerdict.NOT_BETTER: "no closer to the dense model than with the mask alone: do not use this repair without a test on "
    "your task; use more text",
}
