"""Saving models, pruned or not, as Hugging Face folders that are written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from liar.errors import CheckpointError, LiarError, ModelError
from liar.files import user_path
from liar.io.card import model_card
from liar.io.folders import check_target, files_in, replacing
from liar.io.shapes import Shapes, differences, fitted, stored_shapes
from liar.io.sizes import config_sizes
from liar.io.standalone import Form, in_form
from liar.mask import Mask
from liar.models import Layout, is_plain, layout_with_weights, stored_state, transformer_in
from liar.options import check_flag
from liar.report import Report
from liar.surgery import all_or_nothing, build_stock, stock_class
from liar.versions import versions

FORMAT = 1


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    mask: Mask | None = None,
    report: Report | None = None,
    extra: Mapping[str, str] | None = None,
    standalone: bool = False,
    overwrite: bool = True,
) -> None:
    """Write a model, pruned or not, as a Hugging Face folder, completely or not at all, even if the process is killed.

    Beside the usual files there is `liar.json` (class of the model, units of every site, versions, names of the files).
    Where all layers keep equally many units and the stock class can express the number, plain transformers loads the folder.
    Otherwise `config.json` gets a `per_layer_config`, and `from_pretrained` of the stock class raises an error; use
    `liar.load`, or write a standalone folder. Auto classes that build no model (`AutoConfig`, `AutoTokenizer`) read both.

    `README.md` is a model card, with the licence of the model that this one was made from and the numbers of the report.

    A model that was loaded from a GGUF file, and so dequantised, is saved as the ordinary model it is: its quantisation mark
    is removed.

    Args:
        model: of a known family, or a model of sentence-transformers with one inside, which is then saved whole.
        folder: replaced as a whole, if it holds nothing but a model that this function or `save_pretrained` wrote. The
            current folder, and one that cannot be renamed (a mounted volume), have to be empty.
        tokenizer: written too, if given.
        mask: the mask the model was cut by; `liar.json` then names the kept units.
        report: written as `report.json`.
        extra: further files, name -> text, that belong to the same step (`{"run.json": "…"}`); a `README.md` among them takes
            the place of the model card.
        standalone: write the code that builds the model too, where plain transformers cannot. The folder then loads without
            this library, with `trust_remote_code=True`: by auto classes, pipelines, sentence-transformers.
        overwrite: False refuses a folder that is there and not empty.

    Raises:
        CheckpointError: the folder must not be replaced (it holds something else, or other models), cannot be written, the
            mask is not this model's, the model is not what its configuration says, so that it could not be loaded, or no auto
            class loads a standalone one.
        ModelError: the model is of no known family, or quantised.

    Example:
        >>> report = liar.prune(model, calib, keep=0.5, progress=False)
        >>> liar.save(model, "slim", report=report)
        >>> again = liar.load("slim")
        >>> torch.equal(again(**calib[0]).last_hidden_state, model(**calib[0]).last_hidden_state)
        True
    """
    inner: PreTrainedModel = transformer_in(model)
    layout = layout_with_weights(inner)
    _check_arguments(tokenizer, mask, report, {} if extra is None else extra, standalone)
    files = dict(extra or {})
    record = _record(inner, layout, mask)
    if report is not None:
        files["report.json"] = report.to_json()
    check_target(folder, overwrite=overwrite)
    with all_or_nothing(inner):
        try:
            _clear_quantisation_mark(inner)
            _check_loadable(inner)
            sizes = config_sizes(inner, layout)
            form = Form.standalone(inner, layout, sizes) if standalone else Form.stock(inner)
            is_stock = "per_layer_config" not in sizes
            loading = _loading(model, form, user_path(folder).resolve().name, is_stock=is_stock)
            library = "transformers" if model is inner else "sentence-transformers"
            is_pruned = mask is not None or report is not None or not is_stock
            files.setdefault("README.md", model_card(inner, report, loading, library=library, is_pruned=is_pruned))
            with replacing(user_path(folder)) as fresh, in_form(inner, form), stored_state(inner):
                _write(model, inner, fresh, is_stock=is_stock)
                if tokenizer is not None:
                    tokenizer.save_pretrained(fresh)
                config = json.loads((fresh / "config.json").read_text(encoding="utf-8"))
                written = files_in(fresh)
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


def _write(model: Any, inner: PreTrainedModel, folder: Path, *, is_stock: bool) -> None:
    """Let a model write its files, and check them."""
    if model is inner:
        model.save_pretrained(folder)
        if not is_stock and _renamed(model, stored_shapes(str(folder), None, {})):
            model.save_pretrained(folder, save_original_format=False)
    else:
        model.save_pretrained(str(folder), create_model_card=False)
        if not (folder / "config.json").exists():
            raise CheckpointError(
                f"the {type(model).__name__} does not save its transformer into the folder itself, where liar.load and others "
                "look for it: save the transformer alone, liar.save(model[0].auto_model, folder)"
            )
    _check_written(inner, folder, is_stock=is_stock)


def _loading(model: nn.Module, form: Form, name: str, *, is_stock: bool) -> str:
    """Lines of Python that load a model from the folder of some name."""
    own, remote = type(model), "" if is_stock else ", trust_remote_code=True"
    if not is_stock and form.layers is None:
        return f'import liar\n\nmodel = liar.load("{name}")'
    if isinstance(model, PreTrainedModel):
        return f'from transformers import {form.loader}\n\nmodel = {form.loader}.from_pretrained("{name}"{remote})'
    return f'from sentence_transformers import {own.__name__}\n\nmodel = {own.__name__}("{name}"{remote})'


def _check_arguments(tokenizer: Any, mask: Any, report: Any, extra: Any, standalone: Any) -> None:
    check_flag("standalone", standalone)
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


def _renamed(model: PreTrainedModel, stored: Shapes) -> list[str]:
    """Tensors that are written in the format of the first releases of a model, which named them in another way, or joined some.

    What the stock class loads may have that format; of what it cannot load, `load` needs the tensors themselves.
    """
    return sorted(stored.keys() - model.state_dict().keys())


def _check_written(model: PreTrainedModel, folder: Path, *, is_stock: bool) -> None:
    """Check that every parameter is in the weight files, or is tied to one that is when the model is loaded."""
    stored = stored_shapes(str(folder), None, {})
    if renamed := _renamed(model, stored):
        if is_stock:
            return
        raise CheckpointError(
            f"a tensor is written as {renamed[0]}, a name of the first releases of this model, by which the sizes of a pruned "
            "layer are not found again: save the transformer alone, liar.save(model[0].auto_model, folder)"
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    made_anew = set(model._keys_to_ignore_on_save or ())
    lost = sorted(parameters.keys() - stored.keys() - model.all_tied_weights_keys.keys() - made_anew)
    if lost:
        raise CheckpointError(
            f"{lost[0]} is not written by save_pretrained, since it shares its memory with another parameter, and would be "
            "missing: give it a copy of its own (torch.nn.Parameter(parameter.detach().clone()))"
        )


def _record(model: PreTrainedModel, layout: Layout, mask: Mask | None) -> dict[str, Any]:
    sites: dict[str, dict[str, Any]] = {site.name: {"units": site.units} for site in layout.sites}
    if mask is not None:
        cut = {name: mask.kept(name) for name in mask.masks}
        # Of query heads that share keys and values, a mask may count each.
        possible = {site.name: (site.units, site.units * site.query_heads) for site in layout.sites}
        if wrong := sorted(name for name in cut.keys() | possible.keys() if cut.get(name) not in possible.get(name, ())):
            raise CheckpointError(
                f"the mask is not the one this model was cut by: the units of {', '.join(wrong)} differ; "
                "pass the mask that was given to liar.reconstruct, or none"
            )
        for name, units in mask.masks.items():
            sites[name] |= {"kept": units.nonzero().flatten().tolist(), "of": len(units)}
    return {"format": FORMAT, "class": type(model).__name__, "sites": sites, "versions": versions()}
