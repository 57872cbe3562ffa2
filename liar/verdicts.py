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
    UNTOUCHED = "untouched"

    @property
    def text(self) -> str:
        """One sentence for people."""
        return _TEXTS[self]


_TEXTS = {
    Verdict.OK: "plain least squares",
    Verdict.RIDGED: "least squares with a ridge toward the kept weights",
    Verdict.RANK_DEFICIENT: "the kept channels are linearly dependent on this data: minimum-norm change of the kept weights",
    Verdict.TOO_FEW_TOKENS: "no more tokens than kept channels: the result depends mostly on the ridge; use more text",
    Verdict.KEPT_BASELINE: "no update was better on held-out tokens: the kept weights stay, at most the bias moves",
    Verdict.UNTOUCHED: "everything is kept and nothing before it changed: the layer stays as it is",
}
