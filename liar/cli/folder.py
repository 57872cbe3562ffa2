"""What a folder that a run wrote says of it, for its page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from liar.errors import LiarError
from liar.files import user_path
from liar.mask import Mask
from liar.report import PageSource, Report


def page_sources(paths: Sequence[Path]) -> list[PageSource]:
    """The reports of folders, or of files, with names that tell them apart.

    Raises:
        CheckpointError: there is no report, or it is none.
    """
    paths = [user_path(path) for path in paths]
    folders = [path if path.is_dir() else path.parent for path in paths]
    times = Counter(folder.resolve().name for folder in folders)
    names = [name if times[name := folder.resolve().name] == 1 else str(folder) for folder in folders]
    return [_source(path, folder, name) for path, folder, name in zip(paths, folders, names, strict=True)]


def report_file(path: Path) -> Path:
    """The report of a folder, or the file itself."""
    path = user_path(path)
    return path / "report.json" if path.is_dir() else path


def _source(path: Path, folder: Path, name: str) -> PageSource:
    report = Report.load(report_file(path))
    run = _json(folder / "run.json").get("run", {})
    stock = "per_layer_config" not in _json(folder / "config.json")
    also = "\n# The classes of transformers load this folder, too." if stock and (folder / "config.json").is_file() else ""
    return PageSource(
        name=name,
        report=report,
        mask=_mask(folder / "mask.json"),
        loading=f"import liar\n\nmodel = liar.load({name!r}){also}",
        replaying=f"liar replay {quote(f'{name}/run.json')} --out again" if run else None,
        run=_facts(run) if isinstance(run, Mapping) else {},
    )


def _facts(run: Mapping[str, Any]) -> dict[str, str]:
    """What a reader may want to know of a run; of paths only the last part, the rest is nobody's business."""
    source, how = run.get("source"), run.get("calibration")
    facts = {"Model": Path(str(run.get("model", ""))).name}
    if isinstance(source, Mapping):
        facts["Texts"] = Path(str(source.get("calib", ""))).name
    if isinstance(how, Mapping):
        facts["Longest sequence"] = f"{how.get('max_length')} tokens"
    return facts


def _json(path: Path) -> Mapping[str, Any]:
    """The content of a file that may be missing or damaged: the page then says less."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, Mapping) else {}


def _mask(path: Path) -> Mask | None:
    try:
        return Mask.load(path)
    except LiarError:
        return None
