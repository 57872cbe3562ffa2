"""The model card of a saved model: README.md, as the Hugging Face hub reads it."""

from __future__ import annotations

from math import isfinite
from os.path import isdir
from pathlib import Path
from statistics import median

from huggingface_hub import CardData, ModelCard, ModelCardData
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from liar.report import Report
from liar.versions import versions

# What a pruned model has in common with the model that it was made from: entries of the card.
INHERITED = ("datasets", "language", "license", "license_name", "license_link")
COMPUTED = (
    "The remaining weights were computed by least squares, so that the outputs of the layers change little. There was no "
    "training."
)
TRAINED = (
    "The remaining weights were trained, layer by layer, so that the outputs of the layers are near those of the dense model."
)
PRUNED = "This is `{}` with fewer attention heads or feed-forward neurons."


def model_card(model: PreTrainedModel, report: Report | None, loading: str, *, library: str, is_pruned: bool) -> str:
    """The text of README.md.

    Licence, language and datasets are those of the card beside the weights that the model was loaded from, if there is
    one on this machine.

    Args:
        model: the model that is saved.
        report: of its reconstruction; without one the card has no numbers.
        loading: lines of Python that load the model.
        library: that loads it, by its name on the hub.
        is_pruned: whether that is known of the model.
    """
    source = model.name_or_path or ""
    base = _base_card(source)
    is_on_hub = not isdir(source) and _file(source, "config.json") is not None
    data = ModelCardData(
        base_model=source if is_on_hub else base.get("base_model"),
        library_name=library,
        tags=["liar", *(["pruned", "structured-pruning"] if is_pruned else [])],
        **{name: base.get(name) for name in INHERITED},
    )
    # The path of a folder is nobody's business.
    name = source if is_on_hub else Path(source).name or type(model).__name__
    lines = [
        *([f"# {name}, pruned", PRUNED.format(name)] if is_pruned else [f"# {name}"]),
        *([] if report is None else _numbers(report)),
        "## Load",
        f"```python\n{loading}\n```",
        f"Made with liar {versions()['liar']} (`pip install liar-prune`).",
    ]
    text: str = ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(lines) + "\n").content
    return text


def _base_card(source: str) -> CardData:
    """The entries of the card beside a model's weights; none if there is no card, or a damaged one."""
    file = _file(source, "README.md")
    if file is None:
        return CardData()
    try:
        return ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except Exception:  # noqa: BLE001 (YAML has many ways to be wrong)
        return CardData()


def _file(source: str, name: str) -> Path | None:
    """A file of a model's folder, or of its repository in the cache of the hub; None if it is not on this machine."""
    try:
        file = cached_file(source, name, local_files_only=True)
    except (OSError, ValueError):
        return None
    return Path(file) if file else None


def _numbers(report: Report) -> list[str]:
    """What a report says, as paragraphs."""
    options, (before, after) = report.options, report.parameters
    requested = "" if report.requested is None else f" ({report.requested:.1%} were asked for)"
    facts = [
        f"parameters: {after:,} (before: {before:,})",
        f"parameters of the transformer blocks: {report.achieved:.1%} kept{requested}",
        *(f"{name} of the selection: `{options[name]}`" for name in ("criterion", "budget", "widths") if name in options),
        _how(report),
        f"calibration: {report.tokens:,} tokens in {report.sequences:,} sequences",
    ]
    errors = [(site.before, site.after) for site in report.sites if isfinite(site.before) and isfinite(site.after)]
    if errors:
        first, last = (median(column) for column in zip(*errors, strict=True))
        facts.append(
            f"relative error of a layer's output on held-out data, median of {len(errors)} layers: {last:.3g} "
            f"(without the repair: {first:.3g})"
        )
    if report.quality is not None:
        facts += [f"{measure}, on {report.quality.where}, against the dense model" for measure in report.quality.measures]
        facts.append(f"the output is {report.quality.verdict.text}")
    return [
        TRAINED if "granularity" in options else COMPUTED,
        "\n".join(f"- {fact}" for fact in facts),
        "`report.json` has the numbers of every layer. Measure the model on your task before you use it.",
    ]


def _how(report: Report) -> str:
    """What was done, in one line."""
    names = ("granularity", "propagation", "lora") if "granularity" in report.options else ("target", "ridge")
    return "repair: " + ", ".join(f"{name} `{report.options[name]}`" for name in names)
