"""What a person should know about a report before the numbers: warnings first, then notes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from liar.report.content import ReportContent, SiteReport, kind_of
from liar.verdicts import OutputVerdict, Verdict

# The least share of distinct calibration tokens that is not worth a word.
DISTINCT = 0.9
# Calibration tokens for every kept channel of the widest layer: a good minimum.
TOKENS_PER_CHANNEL = 10
# A budget is met if so much of it is there.
MET = 0.99
# Names of sites in a sentence.
NAMED = 6
# Errors, relative to the energy of the target, that are rounding and nothing else.
ROUNDING = 1e-6

# What happened at a site, in a few words, and whether that is good ("good"), neither ("plain"), or to be looked at ("warning").
WORDS = {
    Verdict.OK: ("repaired", "good"),
    Verdict.RIDGED: ("repaired, held near the old weights by a ridge", "good"),
    Verdict.RANK_DEFICIENT: ("repaired by the smallest change that fits", "good"),
    Verdict.TOO_FEW_TOKENS: ("too little text", "warning"),
    Verdict.KEPT_BASELINE: ("not repaired: no update was better on held-out text", "plain"),
    Verdict.NOTHING_HELD_OUT: ("not repaired: no text to test an update on", "warning"),
    Verdict.UNTOUCHED: ("nothing to repair", "plain"),
    Verdict.REFINED: ("trained toward the dense model", "good"),
    Verdict.UNDONE: ("trained and put back: the model as a whole was no better", "plain"),
}


@dataclass(frozen=True)
class Finding:
    """One sentence about a report.

    Attributes:
        level: `"warning"`, or `"note"` for what is good to know.
        text: the sentence.
    """

    level: str
    text: str


def words_of(site: SiteReport) -> tuple[str, str]:
    """(what happened at a site, `"good"`, `"plain"` or `"warning"`): never good where the held-out error did not fall."""
    words, level = WORDS[site.verdict]
    if abs(site.before) <= ROUNDING and abs(site.after) <= ROUNDING:
        return "nothing to repair", "plain"
    if _is_worse(site):
        return f"{words}, but the held-out error rose", "warning"
    if level == "good" and not site.after < site.before:
        return f"{words}, but the held-out error did not fall", "plain"
    return words, level


def _is_worse(site: SiteReport) -> bool:
    return site.after > site.before + ROUNDING


def findings(report: ReportContent) -> list[Finding]:
    """All that applies, warnings first."""
    found = [*_of_output(report), *_of_sites(report), *_of_data(report), *_of_budget(report)]
    return sorted(found, key=lambda finding: finding.level != "warning")


def _of_output(report: ReportContent) -> Iterator[Finding]:
    quality = report.quality
    if quality is None:
        yield Finding("note", "The output was not compared with the dense model's: there are errors of layers only.")
        return
    if quality.verdict is OutputVerdict.NOT_BETTER:
        measures = "; ".join(str(measure) for measure in quality.measures)
        yield Finding("warning", f"On {quality.where}, the output is {quality.verdict.text}. {measures}.")
    if not quality.held_out:
        yield Finding(
            "note",
            f"The output was compared on {quality.where}: the weights were fitted to this text, so the numbers flatter the "
            "repair. For numbers on other text, pass held_out or set_aside.",
        )


def _of_sites(report: ReportContent) -> Iterator[Finding]:
    sites = report.sites
    for verdict in (Verdict.TOO_FEW_TOKENS, Verdict.NOTHING_HELD_OUT):
        if some := [site for site in sites if site.verdict is verdict]:
            yield Finding("warning", f"{_named(some, sites)}: {verdict.text}.")
    if worse := [site for site in sites if _is_worse(site)]:
        yield Finding("warning", f"{_named(worse, sites)}: the held-out error is larger after the repair than before it.")
    if kept := [site for site in sites if site.verdict is Verdict.KEPT_BASELINE]:
        yield Finding("note", f"{_named(kept, sites)}: {Verdict.KEPT_BASELINE.text}.")
    if created := [site for site in sites if site.bias_created]:
        yield Finding("note", f"{_named(created, sites)}: got a bias, so the stock class may be unable to load the model.")
    ridge = report.options.get("ridge", "auto")
    if ridge != "auto":
        yield Finding("note", f"The ridge was given ({ridge}), not chosen on held-out text: nothing guarded against a bad one.")


def _of_data(report: ReportContent) -> Iterator[Finding]:
    distinct = report.distinct_tokens
    if distinct is not None and distinct < DISTINCT * report.tokens:
        yield Finding("warning", f"Only {distinct:,} of {report.tokens:,} calibration tokens are distinct; copies count once.")
    widest = max((site.kept for site in report.sites if kind_of(site.site) == "neurons"), default=0)
    available = report.tokens if distinct is None else distinct
    if available < TOKENS_PER_CHANNEL * widest:
        yield Finding(
            "note",
            f"{available:,} distinct calibration tokens for layers of up to {widest:,} kept channels: "
            f"{available / widest:.1f} for each, where {TOKENS_PER_CHANNEL} are a good minimum. Use more text if you can.",
        )


def _of_budget(report: ReportContent) -> Iterator[Finding]:
    if report.requested is not None and report.achieved < MET * report.requested:
        yield Finding(
            "note",
            f"Less is left than was asked for: {report.achieved:.1%} of the block parameters, not {report.requested:.1%}.",
        )


def _named(some: Sequence[SiteReport], sites: Sequence[SiteReport]) -> str:
    """So many sites out of all, and the names of the first of them."""
    names = ", ".join(site.site for site in some[:NAMED]) + (", …" if len(some) > NAMED else "")
    return f"{len(some)} of {len(sites)} layers ({names})"
