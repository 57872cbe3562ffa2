"""Saving models, pruned or not, as Hugging Face folders that are written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from liar.errors import CheckpointError, LiarError, ModelError
from liar.files import user_path
from liar.io.folders import check_target, replacing
from liar.io.shapes import differences, fitted, stored_shapes
from liar.mask import Mask
from liar.models import Layout, discover, discover_with_weights, family_of, is_plain
from liar.report import Report
from liar.surgery import all_or_nothing, build_stock, scaled_sizes, stock_class, uniform_sizes
from liar.versions import versions

FORMAT = 1


def save(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    mask: Mask | None = None,
    report: Report | None = None,
    extra: Mapping[str, str] | None = None,
    overwrite: bool = True,
) -> None:
    """Write a model, pruned or not, as a Hugging Face folder that a kill at any moment leaves whole: as it was, or new.

    Beside the usual files there is `liar.json` (class of the model, units of every site, versions, names of the files).
    Where all layers keep equally many units and the stock class can express the number, plain transformers loads the folder.
    Otherwise `config.json` gets a `per_layer_config`, at which `from_pretrained` of the stock class stops; use `liar.load`.
    Auto classes that do not build the model (`AutoConfig`, `AutoTokenizer`) work on both.

    A model that was loaded from a GGUF file, and so dequantised, is saved as the ordinary model it is: its quantisation mark
    is removed.

    Args:
        model: of a known family.
        folder: replaced as a whole, if it holds nothing but a model that this function or `save_pretrained` wrote. The
            current folder, and one that cannot be renamed (a mounted volume), have to be empty.
        tokenizer: written too, if given.
        mask: the mask the model was cut by; `liar.json` then names the kept units.
        report: written as `report.json`.
        extra: further files, name -> text, that belong to the same step (`{"run.json": "…"}`).
        overwrite: False refuses a folder that is there and not empty.

    Raises:
        CheckpointError: the folder must not be replaced (it holds something else, or other models), cannot be written, the
            mask is not this model's, or the model is not what its configuration says, so that it could not be loaded.
        ModelError: the model is of no known family, or quantised.

    Example:
        >>> report = liar.prune(model, calib, keep=0.5)  # doctest: +SKIP
        >>> liar.save(model, "slim", report=report)  # doctest: +SKIP
        >>> model = liar.load("slim")  # doctest: +SKIP
    """
    layout = discover_with_weights(model)
    _check_arguments(tokenizer, mask, report, {} if extra is None else extra)
    files = dict(extra or {})
    record = _record(model, layout, mask)
    if report is not None:
        files["report.json"] = report.to_json()
    check_target(folder, overwrite=overwrite)
    with all_or_nothing(model):
        try:
            _clear_quantisation_mark(model)
            _check_loadable(model)
            sizes = _sizes(model, layout)
            with replacing(user_path(folder)) as fresh:
                # The names that the model has now; transformers 5.0 would give those of its first files to the norms of a BERT.
                model.save_pretrained(fresh, save_original_format=False)
                _check_written(model, fresh)
                if tokenizer is not None:
                    tokenizer.save_pretrained(fresh)
                config = json.loads((fresh / "config.json").read_text(encoding="utf-8"))
                written = {path.name for path in fresh.iterdir()}
                if taken := sorted(written & files.keys()):
                    raise CheckpointError(
                        f"extra[{taken[0]!r}]: the model or its tokenizer has a file of this name; choose another"
                    )
                files["config.json"] = json.dumps({**config, **sizes}, indent=2, sort_keys=True) + "\n"
                names = sorted({*written, *files, "liar.json"})
                files["liar.json"] = json.dumps({**record, "files": names}, indent=1)
                for name, text in files.items():
                    (fresh / name).write_text(text, encoding="utf-8")
        except LiarError:
            raise
        except Exception as error:  # transformers, safetensors and tokenizers raise whatever they raise
            raise CheckpointError(
                f"cannot write {folder}: {type(error).__name__}: {error}; what was there is as it was. If it is the disk, free "
                "space, or choose another folder"
            ) from error


def _check_arguments(tokenizer: Any, mask: Any, report: Any, extra: Any) -> None:
    for name, value, kind in (("mask", mask, Mask), ("report", report, Report)):
        if value is not None and not isinstance(value, kind):
            raise CheckpointError(f"{name}: expected a liar.{kind.__name__}, got a {type(value).__name__}")
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise CheckpointError(f"tokenizer: expected a Hugging Face tokenizer, got a {type(tokenizer).__name__}")
    if not isinstance(extra, Mapping):
        raise CheckpointError(f"extra: expected texts by their file names, got a {type(extra).__name__}")
    for name, text in extra.items():
        if not isinstance(name, str) or not name or Path(name).name != name or not isinstance(text, str):
            raise CheckpointError(f"extra[{name!r}]: expected a plain file name with a text, got a {type(text).__name__}")
        if name in ("config.json", "liar.json", "report.json"):
            raise CheckpointError(f"extra[{name!r}]: the folder has a file of this name of its own; choose another")


def _clear_quantisation_mark(model: PreTrainedModel) -> None:
    """Make a model ordinary that was dequantised when it was loaded (GGUF): `save_pretrained` refuses it by its mark."""
    if getattr(model, "hf_quantizer", None) is None:
        return
    for name, parameter in model.named_parameters():
        if not is_plain(parameter):
            raise ModelError(
                f"{name} is quantised: load the model unquantised (or dequantise it), reconstruct it, then quantise"
            )
    model.hf_quantizer = None  # type: ignore[assignment]
    vars(model).pop("quantization_method", None)
    vars(model.config).pop("quantization_config", None)


def _check_loadable(model: PreTrainedModel) -> None:
    """Check that the model's class builds, from its configuration, just what the model is, cut to its units."""
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    wrong = "the model is not what its configuration says, and could not be loaded again"
    try:
        built = build_stock(model, {}, lambda stock: fitted(stock, shapes, wrong))  # type: ignore[arg-type]
    except CheckpointError as error:
        raise CheckpointError(f"{error} (if blocks were removed by hand, tell model.config)") from error
    if built is None:
        raise CheckpointError(f"{wrong}: {stock_class(model).__name__} cannot be built from it")
    found = differences(shapes, built, extra=type(model) is stock_class(model))
    if found:
        raise CheckpointError(
            f"{wrong}: {found}. Make model.config say what the model has (num_hidden_layers, vocab_size, …), or remove what "
            "was added to it"
        )


def _check_written(model: PreTrainedModel, folder: Path) -> None:
    """Check that every parameter is in the weight files, or is tied to one that is when the model is loaded."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    lost = sorted(parameters.keys() - stored_shapes(str(folder), None, {}).keys() - model.all_tied_weights_keys.keys())
    if lost:
        raise CheckpointError(
            f"{lost[0]} is not written by save_pretrained, since it shares its memory with another parameter, and would be "
            "missing: give it a copy of its own (torch.nn.Parameter(parameter.detach().clone()))"
        )


def _record(model: PreTrainedModel, layout: Layout, mask: Mask | None) -> dict[str, Any]:
    sites: dict[str, dict[str, Any]] = {site.name: {"units": site.units} for site in layout.sites}
    if mask is not None:
        cut = {name: mask.kept(name) for name in mask.masks}
        if cut != {name: site["units"] for name, site in sites.items()}:
            wrong = sorted(name for name in cut.keys() | sites.keys() if cut.get(name) != sites.get(name, {}).get("units"))
            raise CheckpointError(
                f"the mask is not the one this model was cut by: the units of {', '.join(wrong)} differ; "
                "pass the mask that was given to liar.reconstruct, or none"
            )
        for name, units in mask.masks.items():
            sites[name] |= {"kept": units.nonzero().flatten().tolist(), "of": len(units)}
    return {"format": FORMAT, "class": type(model).__name__, "sites": sites, "versions": versions()}


def _sizes(model: PreTrainedModel, layout: Layout) -> dict[str, Any]:
    """Entries of config.json that tell the sizes of a model: of all layers at once, or layer by layer."""
    uniform = uniform_sizes(model)
    if uniform is not None:
        return dict(uniform)
    stock = build_stock(model, {})
    assert stock is not None, "a model is built from its configuration"
    units = {site.name: site.units for site in layout.sites}
    patterns = {pattern.kind: pattern for pattern in family_of(model).patterns}
    layers: dict[str, dict[str, int]] = {}
    for site in discover(stock).sites:
        sizes = scaled_sizes(model, patterns[site.kind], units[site.name], site.units)
        layers.setdefault(str(site.layer), {}).update(sizes)
    return {"per_layer_config": _readable(model, layers)}


def _readable(model: PreTrainedModel, layers: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """The sizes by layer without the one that the class of the configuration reads for all layers at once (LLaMA: the heads).

    With it, no class that reads the configuration works: not the tokenizer, not `AutoConfig`.
    """
    entries = model.config.to_dict()
    for left_out in (None, *sorted({key for sizes in layers.values() for key in sizes})):
        kept = {layer: {key: size for key, size in sizes.items() if key != left_out} for layer, sizes in layers.items()}
        try:
            type(model.config).from_dict({**entries, "per_layer_config": kept})
        except Exception:  # noqa: BLE001 (every class refuses a configuration in its own way)
            continue
        return kept
    return {layer: dict(sizes) for layer, sizes in layers.items()}
