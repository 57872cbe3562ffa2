"""Whether a text is in a natural language; `py3langid` says so.

It is small (5 MB, with its model inside), needs nothing but NumPy, asks no server, and knows a class for what is no language.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from liar.errors import CalibrationError, OptionError

# The class of texts without linguistic content (ISO 639-2).
NO_LANGUAGE = "zxx"
# Probability from which a text counts as one in the most probable language. Close languages (Croatian, Bosnian and Serbian)
# share it; of random letters and of a few words it is below.
SURE = 0.3


def language_check(language: str) -> Callable[[str], bool]:
    """A function that says whether a text is kept; blank ones never are.

    Args:
        language: `"any"`, the code of one, or `"off"`.

    Raises:
        OptionError: no such code.
        CalibrationError: the detector is not installed.

    Example:
        >>> language_check("off")("x = 1"), language_check("off")(" ")
        (True, False)
    """
    if language == "off":
        return lambda text: bool(text.strip())
    try:
        detector = _detector()
    except ImportError as error:
        raise CalibrationError(
            f"language={language!r}: telling languages needs the package py3langid, which is not installed: "
            'pip install "liar-prune[language]", or take all texts with language="off"'
        ) from error
    languages = {*detector.labels} - {NO_LANGUAGE}
    if language != "any" and language not in languages:
        raise OptionError(f"language={language!r}: expected any, off, or one of {', '.join(sorted(languages))}")
    wanted = languages if language == "any" else {language}

    def is_kept(text: str) -> bool:
        detected, probability = detector.classify(text)
        return detected in wanted and probability >= SURE

    return is_kept


@cache
def _detector() -> Any:
    """It takes seconds to load."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # noqa: PLC0415 (an extra)

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
