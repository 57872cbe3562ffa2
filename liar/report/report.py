"""What happened at every site: a frozen `Report`, as a table for people and JSON for programs."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liar.errors import CheckpointError, wrap_parse_errors
from liar.files import user_path, write_text
from liar.mask import Mask
from liar.report.content import CostChange, ReportContent, SiteReport
from liar.report.page import PageSource, notebook_cell, write_page
from liar.report.quality import METRICS, Measure, Quality
from liar.verdicts import Verdict

if TYPE_CHECKING:
    from rich.table import Table

WRITTEN = "a report.json that liar wrote"
HEADINGS = ("site", "kept", "of", "error before", "after", "ridge", "condition", "seconds", "verdict")
CAPTION = "error: squared error on held-out tokens over the target's energy (0 is perfect), before and after reconstruction"


@dataclass(frozen=True)
class Report(ReportContent):
    """The outcome of one reconstruction.

    Attributes:
        sites: one entry per site, in the order of the data.
        requested: share of the blocks' parameters that was requested; None if the mask came from elsewhere.
        achieved: share of the blocks' parameters that is left.
        parameters: of the whole model, (before, after).
        tokens: calibration tokens used.
        sequences: calibration sequences used.
        options: target, ridge, refit, solver, bias, quality, set_aside; after `liar.prune` also criterion, budget and widths.
        dtype: of the weights.
        seconds: wall time by stage.
        quality: the output beside the dense model's; None if it was not compared.
        distinct_tokens: calibration tokens that are not copies; None in reports of earlier versions.
        lengths: of the calibration sequences in tokens: (shortest, median, longest); None in reports of earlier versions.
        cost: by the budget that units were selected by; None if the mask came from elsewhere.

    Example:
        >>> report = liar.prune(model, calib, keep=0.5)
        >>> report.sites[1].kept < report.sites[1].total
        True
        >>> Report.from_json(report.to_json()).verdicts == report.verdicts
        True
    """

    @property
    def verdicts(self) -> dict[str, Verdict]:
        """Site name -> verdict."""
        return {site.site: site.verdict for site in self.sites}

    def to_json(self) -> str:
        """JSON text; NaN and infinity become strings, since JSON has no such numbers."""
        return json.dumps(_with_plain_numbers(asdict(self)), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The inverse of `to_json`.

        Raises:
            CheckpointError: the text is not such a JSON.
        """
        with wrap_parse_errors(CheckpointError, WRITTEN):
            content = json.loads(text)
            sites = tuple(SiteReport(**_read(SITE, site)) for site in content.pop("sites"))
            if not sites:
                raise ValueError("no sites")
            return cls(sites=sites, **_read(REPORT, content))

    def save(self, path: str | Path) -> None:
        """Write `to_json` to a file, whole or not at all."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read a file that `save` wrote.

        Raises:
            CheckpointError: it is not one.
        """
        with wrap_parse_errors(CheckpointError, WRITTEN, path):
            return cls.from_json(user_path(path).read_text(encoding="utf-8"))

    def to_html(self, path: str | Path, *, name: str = "This model", mask: Mask | None = None) -> None:
        """Write one self-contained web page: warnings, output, what was kept, errors, calibration data, how to load.

        Args:
            path: of the page, which ends in `.html`.
            name: what the page calls the model.
            mask: which units stay: heads are then shown one by one.

        Raises:
            OptionError: another ending.
            ImportError: matplotlib is not installed.
            CheckpointError: the file cannot be written.

        Example:
            >>> report = liar.prune(model, calib, keep=0.5)
            >>> report.to_html("report.html", name="slim")
        """
        write_page([PageSource(name, self, mask)], path)

    def _repr_html_(self) -> str:
        """What notebooks show."""
        return notebook_cell(self)

    def table(self) -> Table:
        """A `rich` table; `print(report)` shows it."""
        from rich.table import Table  # noqa: PLC0415 (an extra)

        table = Table(title=self._title(), caption=CAPTION)
        for number, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="left" if number in (0, len(HEADINGS) - 1) else "right")
        for row in self.rows():
            table.add_row(*row)
        return table

    def rows(self) -> list[tuple[str, ...]]:
        """The rows of the table as text: site, kept, of, error before, after, ridge, condition, seconds, verdict."""
        rows: list[tuple[str, ...]] = []
        for site in self.sites:
            numbers = (
                f"{site.before:.4f}",
                f"{site.after:.4f}",
                f"{site.ridge:.0e}",
                f"{site.condition:.0e}",
                f"{site.seconds:.2f}",
            )
            verdict = site.verdict.value + (" +bias" if site.bias_created else "")
            rows.append((site.site, str(site.kept), str(site.total), *numbers, verdict))
        return rows

    def _title(self) -> str:
        requested = "" if self.requested is None else f" ({self.requested:.1%} requested)"
        before, after = self.parameters
        changed = sum(site.ridge < math.inf for site in self.sites)
        return (
            f"{self.achieved:.1%} of the block parameters kept{requested}; model {before:,} to {after:,} parameters; "
            f"{self.tokens:,} calibration tokens; {changed} of {len(self.sites)} layers repaired; "
            f"{sum(self.seconds.values()):.1f} s"
        )

    def __str__(self) -> str:
        verdicts = [f"{verdict.value}: {verdict.text}" for verdict in sorted({site.verdict for site in self.sites})]
        below = [*verdicts, *(self.quality.lines() if self.quality else [])]
        try:
            from rich.console import Console  # noqa: PLC0415 (an extra)
        except ImportError:
            rows = ["\t".join(row) for row in (HEADINGS, *self.rows())]
            return "\n".join([self._title(), *rows, *below, ""])
        console = Console(file=io.StringIO(), width=120)
        console.print(self.table())
        for line in below:
            console.print(line, highlight=False, markup=False)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()


def _with_plain_numbers(content: Any) -> Any:
    """The same with NaN and infinity as text: JSON has no such numbers."""
    if isinstance(content, Mapping):
        return {name: _with_plain_numbers(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_with_plain_numbers(value) for value in content]
    return str(content) if isinstance(content, float) and not math.isfinite(content) else content


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"expected a count, got {value!r}")
    return value


def _number(value: Any) -> float:
    """A number, or the text that stands for one that JSON does not have."""
    if isinstance(value, str) and value in ("nan", "inf", "-inf"):
        return float(value)
    if type(value) not in (int, float):
        raise ValueError(f"expected a number, got {value!r}")
    return float(value)


def _share(value: Any) -> float:
    number = _number(value)
    if not 0 <= number <= 1:
        raise ValueError(f"expected a share, got {value!r}")
    return number


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text, got {value!r}")
    return value


def _site_name(value: Any) -> str:
    name = _text(value)
    kind, _, layer = name.rpartition(".")
    if not kind or not layer.isdecimal():
        raise ValueError(f'expected the name of a site, such as "heads.0", got {value!r}')
    return name


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"expected true or false, got {value!r}")
    return value


def _pair(value: Any) -> tuple[int, int]:
    before, after = value
    return _count(before), _count(after)


def _lengths(value: Any) -> tuple[int, int, int]:
    shortest, median, longest = value
    return _count(shortest), _count(median), _count(longest)


def _metric(value: Any) -> str:
    if value not in METRICS:
        raise ValueError(f"expected one of {', '.join(METRICS)}, got {value!r}")
    return _text(value)


def _measures(value: Any) -> tuple[Measure, ...]:
    return tuple(Measure(**_read(MEASURE, each)) for each in value)


def _optional(reader: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else reader(value)


# What a field of a file becomes.
Readers = Mapping[str, Callable[[Any], Any]]
SITE: Readers = {
    "site": _site_name,
    "module": _text,
    "kept": _count,
    "total": _count,
    "before": _number,
    "after": _number,
    "verdict": Verdict,
    "ridge": _number,
    "condition": _number,
    "seconds": _number,
    "bias_created": _flag,
}
MEASURE: Readers = {"output": _text, "metric": _metric, "repaired": _number, "mask_only": _number}
QUALITY: Readers = {
    "measures": _measures,
    "sequences": _count,
    "tokens": _count,
    "predictions": _count,
    "held_out": _flag,
}
COST: Readers = {"name": _text, "before": _number, "after": _number}
REPORT: Readers = {
    "requested": _optional(_share),
    "achieved": _share,
    "parameters": _pair,
    "tokens": _count,
    "sequences": _count,
    "options": lambda value: {_text(name): each for name, each in value.items()},
    "dtype": _text,
    "seconds": lambda value: {_text(name): _number(each) for name, each in value.items()},
    "quality": _optional(lambda value: Quality(**_read(QUALITY, value))),
    "distinct_tokens": _optional(_count),
    "lengths": _optional(_lengths),
    "cost": _optional(lambda value: CostChange(**_read(COST, value))),
}


def _read(readers: Readers, content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a file, each by its reader; a field that is missing or unknown is an error of the class that takes them."""
    fields = {}
    for name, value in content.items():
        try:
            fields[name] = readers[name](value) if name in readers else value
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ValueError(f"{name}: {error}") from error
    return fields
