"""Saving and loading pruned models in Hugging Face folders.

A folder is written whole or not at all. Loading looks at the shapes of the tensors in the file, so folders that a Trainer
or `model.save_pretrained` wrote load as well. The model that comes back is an instance of the stock class.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from liar.errors import CheckpointError
from liar.io.atomic import check_target, replacing
from liar.io.shapes import fitted, stored_shapes
from liar.mask import Mask
from liar.models import Layout, discover, families, family_of
from liar.report import Report
from liar.surgery import build_stock, scaled_sizes, uniform_sizes

FORMAT = 1
# Arguments of `from_pretrained` that say where a file is, not how a model is built.
PLACE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
BUILD = ("device_map", "dtype", "torch_dtype", "attn_implementation", "quantization_config")


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

    Beside the usual files there is `liar.json` (units of every site, versions). Where all layers keep equally many units
    and the stock class can express the number, plain transformers loads the folder. Otherwise `config.json` gets a
    `per_layer_config`, at which `from_pretrained` of the stock class stops; use `liar.load`.

    Args:
        model: of a known family.
        folder: replaced as a whole: nothing of what it held before stays.
        tokenizer: written too, if given.
        mask: the mask the model was cut by; `liar.json` then names the kept units.
        report: written as `report.json`.
        extra: further files, name -> text, that belong to the same step (`{"run.json": "…"}`).
        overwrite: False refuses a folder that is there and not empty.

    Raises:
        CheckpointError: the folder must not be replaced (it is no model folder, or holds others), cannot be written, or
            the mask is not this model's.
        ModelError: the model is of no known family.

    Example:
        >>> report = liar.prune(model, calib, keep=0.5)  # doctest: +SKIP
        >>> liar.save(model, "slim", report=report)  # doctest: +SKIP
        >>> model = liar.load("slim")  # doctest: +SKIP
    """
    layout = discover(model)
    files = {"liar.json": _record(layout, mask), **(extra or {})}
    if report is not None:
        files["report.json"] = report.to_json()
    sizes = _sizes(model, layout)
    check_target(folder, overwrite=overwrite)
    try:
        with replacing(Path(folder)) as fresh:
            model.save_pretrained(fresh)
            if tokenizer is not None:
                tokenizer.save_pretrained(fresh)
            config = json.loads((fresh / "config.json").read_text(encoding="utf-8"))
            files["config.json"] = json.dumps({**config, **sizes}, indent=2, sort_keys=True) + "\n"
            for name, text in files.items():
                (fresh / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"cannot write {folder}: {error}; what was there is as it was. Free space, or choose another folder"
        ) from error


def load(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a model, pruned or not, in evaluation mode, as an instance of the stock class its configuration names.

    Args:
        folder: a local folder, or the name of a repository on the hub.
        **kwargs: as for `from_pretrained` (`dtype`, `device_map`, `attn_implementation`, …).

    Raises:
        CheckpointError: no such folder, a damaged file, or shapes that no cut of the configured class has.

    Example:
        >>> model = liar.load("slim", dtype=torch.bfloat16)  # doctest: +SKIP
    """
    where = str(folder)
    place = {name: kwargs[name] for name in PLACE if name in kwargs}
    entries = _config_entries(where, place)
    kind = str(entries.get("model_type"))
    if not _is_known(kind) or "quantization_config" in entries or "config" in kwargs:
        stock_model: PreTrainedModel = (_named_class(entries) or AutoModel).from_pretrained(where, **kwargs)
        return stock_model
    # Transformers refuses the block, or fails to build from it; the shapes say the same.
    entries.pop("per_layer_config", None)
    fields = {name: kwargs.pop(name) for name in list(kwargs) if name not in (*PLACE, *BUILD)}
    config, rest = CONFIG_MAPPING[kind].from_dict(entries, return_unused_kwargs=True, **fields)
    stock: type[PreTrainedModel] = _named_class(entries) or MODEL_MAPPING[type(config)]  # type: ignore[assignment]
    shapes = stored_shapes(where, rest.get("variant"), place)
    try:
        loaded = fitted(stock, shapes, where).from_pretrained(where, config=config, **kwargs, **rest)
    except OSError as error:
        raise CheckpointError(f"cannot load {where}: {error}") from error
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.__class__ = stock
    return loaded


def load_tokenizer(folder: str) -> Any:
    """The tokenizer of a model folder, also where layers differ in ways that the configuration's class does not accept.

    Raises:
        CheckpointError: there is none.
    """
    entries = _config_entries(folder, {})
    kind = str(entries.get("model_type"))
    config = None
    if entries.pop("per_layer_config", None) and _is_known(kind):
        config = CONFIG_MAPPING[kind].from_dict(entries)
    try:
        return AutoTokenizer.from_pretrained(folder, config=config)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: expected a model folder with a tokenizer, or a name on the hub: {error}. Save the tokenizer to it"
        ) from error


def _is_known(kind: str) -> bool:
    """Whether this library and transformers know a `model_type`."""
    return kind in CONFIG_MAPPING and kind in {family.model_type for family in families()}


def versions() -> dict[str, str]:
    """Versions of what makes a result: this library, torch, transformers."""
    return {"liar": version("liar-prune"), "torch": torch.__version__, "transformers": transformers.__version__}


def _record(layout: Layout, mask: Mask | None) -> str:
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
    return json.dumps({"format": FORMAT, "sites": sites, "versions": versions()}, indent=1)


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
    return {"per_layer_config": layers}


def _config_entries(where: str, place: Mapping[str, Any]) -> dict[str, Any]:
    path = Path(where)
    if not path.is_dir() and (path.is_absolute() or where.startswith((".", "~")) or path.exists()):
        actual = "a file" if path.exists() else "nothing there"
        raise CheckpointError(f"{where}: expected a model folder, got {actual}; check the path")
    reason: object = "there is no config.json"
    try:
        entries, _ = PreTrainedConfig.get_config_dict(where, **place)
    except (OSError, ValueError) as error:
        entries, reason = {}, error
    if not entries:
        raise CheckpointError(
            f"{where}: expected a model folder with a readable config.json, or a name on the hub: {reason}. "
            "Check the path, or save the model again"
        )
    return dict(entries)


def _named_class(entries: Mapping[str, Any]) -> type[PreTrainedModel] | None:
    """The class that `architectures` names, if transformers has it."""
    names = entries.get("architectures") or [""]
    actual = getattr(transformers, names[0], None)
    return actual if isinstance(actual, type) and issubclass(actual, PreTrainedModel) else None
