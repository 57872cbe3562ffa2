"""Loading models, pruned or not, from Hugging Face folders.

Loading looks at the shapes of the tensors in the file, so folders that a Trainer or `model.save_pretrained` wrote load as
well, unless it named tensors as the first releases of the model did (ViT, NomicBERT). The model that comes back is an
instance of the stock class. What the file holds, what the class needs and what `liar.json` says are compared: nothing is left
at random values without a word. No code of a folder runs (docs/security.md).
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import isnan
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from liar.errors import CheckpointError, LiarError, ModelError
from liar.files import user_path
from liar.io.shapes import Shapes, fitted, stored_shapes
from liar.io.standalone import ENTRIES
from liar.models import base_and_prefix, family_for, family_of, is_registered, layout_of, stacks_of
from liar.surgery import OPTIONAL_PARTS, accepts

logger = logging.getLogger(__name__)

# Arguments of `from_pretrained` that say where a file is, not how a model is built.
PLACE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
BUILD = (
    "device_map",
    "max_memory",
    "offload_folder",
    "offload_buffers",
    "dtype",
    "torch_dtype",
    "attn_implementation",
    "quantization_config",
    "trust_remote_code",
    "ignore_mismatched_sizes",
    *OPTIONAL_PARTS,
)
# Entries of the configuration with the number of blocks, by stack.
DEPTHS = (("num_hidden_layers",), ("num_decoder_layers", "decoder_layers"))
# One of them is in every folder with a tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")
QUIET = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
DAMAGED = "Weights and config.json do not belong together, or the folder is damaged: copy or save it again"


def load(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a model, pruned or not, in evaluation mode, as an instance of the stock class its configuration names.

    Args:
        folder: a local folder, or the name of a repository on the hub.
        **kwargs: as for `from_pretrained` (`dtype`, `device_map`, `attn_implementation`, …), or fields of the configuration:
            `architectures=["BertForSequenceClassification"], num_labels=3` gives a pruned encoder a new head, at random
            values. `trust_remote_code` is False unless given.

    Raises:
        CheckpointError: no such folder, a damaged file, tensors that are missing or left over, shapes that no cut of the
            configured class has, or another model than `liar.json` describes.

    Example:
        >>> liar.save(model, "slim")
        >>> liar.load("slim", dtype=torch.bfloat16).dtype
        torch.bfloat16
    """
    where = _where(folder)
    place = {name: kwargs[name] for name in PLACE if name in kwargs}
    kwargs.setdefault("trust_remote_code", False)
    with _reading(where):
        entries = _config_entries(where, place)
        _check_trusted(where, entries, kwargs, place)
        kind = entries.get("model_type")
        if isinstance(kind, str) and kind not in CONFIG_MAPPING and not kwargs["trust_remote_code"]:
            raise CheckpointError(
                f"{where}: config.json says model_type={kind!r}, which transformers does not know; code of a folder does not "
                "run unless you pass trust_remote_code=True"
            )
        if not _is_known(kind) or entries.get("quantization_config") or "config" in kwargs:
            stock_model: PreTrainedModel = (_named_class(entries.get("architectures")) or AutoModel).from_pretrained(
                where, **kwargs
            )
            return stock_model
        known: PreTrainedModel = _load_known(where, entries, kwargs, place)
    return known


def _load_known(where: str, entries: dict[str, Any], kwargs: dict[str, Any], place: Mapping[str, Any]) -> Any:
    # Transformers refuses the block, or fails to build from it; the shapes say the same. The code of a standalone folder is
    # not run, and is not there where the model is saved next.
    for name in ("per_layer_config", *(ENTRIES if "pruned" in entries else ())):
        entries.pop(name, None)
    wants_info = kwargs.pop("output_loading_info", False)
    fields = {name: kwargs.pop(name) for name in list(kwargs) if name not in (*PLACE, *BUILD)}
    config, rest = CONFIG_MAPPING[entries["model_type"]].from_dict(entries, return_unused_kwargs=True, **fields)
    named = _named_class(config.architectures, type(config))
    if named is None and "architectures" in fields:
        raise CheckpointError(f"architectures={config.architectures!r}: transformers has no class of this name")
    stock: type[PreTrainedModel] = named or MODEL_MAPPING[type(config)]  # type: ignore[assignment]
    shapes = stored_shapes(where, rest.get("variant"), place)
    # A field that the user names is their choice.
    shortened = bool(fields.keys() & {"num_hidden_layers", config.attribute_map.get("num_hidden_layers")})
    if not shortened:
        _check_blocks(config, shapes, where)
    for argument, part in OPTIONAL_PARTS.items():
        absent = shapes and not any(f".{part}." in f".{name}" for name in shapes)
        if absent and accepts(stock, argument):
            kwargs.setdefault(argument, False)
    loaded: Any = fitted(stock, shapes, where).from_pretrained(where, config=config, output_loading_info=True, **kwargs, **rest)
    model, info = loaded
    model.__class__ = stock
    _check_complete(model, info, where, another_head="architectures" in fields, shortened=shortened)
    _check_record(model, where, place, fields)
    return (model, info) if wants_info else model


def model_from_config(source: str | Path | PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model on the meta device, of which the configuration alone is read: it has shapes and no weights.

    Args:
        source: a configuration, a folder, or the name of a repository on the hub.
        dtype: of the weights; that of the configuration if None.

    Raises:
        CheckpointError: no such folder, no readable config.json, or a model whose layers differ in width.
        ModelError: a family that is not known.
    """
    where = type(source).__name__ if isinstance(source, PreTrainedConfig) else _where(source)
    with _reading(where):
        config = source if isinstance(source, PreTrainedConfig) else _config_in(where)
        family_for(config)
        stock = _named_class(config.architectures, type(config)) or MODEL_MAPPING[type(config)]
        with torch.device("meta"):
            built: PreTrainedModel = stock._from_config(config, dtype=dtype or config.dtype or torch.float32)  # type: ignore[union-attr]
        built.train(False)
        return built


def _config_in(where: str) -> PreTrainedConfig:
    """The configuration in a folder."""
    entries = _config_entries(where, {})
    _check_trusted(where, entries, {"trust_remote_code": False}, {})
    kind = entries.get("model_type")
    if not _is_known(kind):
        raise ModelError(
            f"{where}: config.json says model_type={kind!r}, which is no family that can be pruned: see `liar families`"
        )
    if "per_layer_config" in entries:
        raise CheckpointError(f"{where}: its layers differ in width, which config.json does not say: pass liar.load({where!r})")
    config: PreTrainedConfig = CONFIG_MAPPING[entries["model_type"]].from_dict(entries)
    return config


def load_tokenizer(folder: str) -> Any:
    """The tokenizer of a model folder. No code of the folder runs.

    Raises:
        CheckpointError: there is none.
    """
    where = _where(folder)
    found = [file for file in TOKENIZER_FILES if cached_file(where, file, **QUIET) is not None]
    try:
        if not found:
            # Transformers would make up an empty one, for some families.
            raise FileNotFoundError(f"there is none of {', '.join(TOKENIZER_FILES)}")
        return AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(
            f"{where}: expected a model folder with a tokenizer, or a name on the hub: "
            f"{str(error).rstrip('. ')}. Save the tokenizer to it. Models of images and sound have none: prune them "
            "in Python, with batches from their processor"
        ) from error


@contextmanager
def _reading(where: str) -> Iterator[None]:
    """Turn whatever transformers raises for a folder into a `CheckpointError`, with the random state as it was."""
    state = torch.get_rng_state()
    try:
        yield
    except LiarError:
        torch.set_rng_state(state)
        raise
    except Exception as error:
        torch.set_rng_state(state)
        wrong_name = isinstance(error, TypeError) and "unexpected keyword argument" in str(error)
        advice = "Check the names of the arguments" if wrong_name else DAMAGED
        raise CheckpointError(f"cannot load {where}: {type(error).__name__}: {str(error).rstrip('. ')}. {advice}") from error


def _where(folder: str | Path) -> str:
    """A folder or a name on the hub, as transformers takes it."""
    path = user_path(folder)
    if path.is_dir():
        return str(path)
    if path.is_absolute() or str(folder).startswith((".", "~")) or path.exists():
        actual = "a file" if path.exists() else "nothing there"
        raise CheckpointError(f"{folder}: expected a model folder, got {actual}; check the path")
    return str(folder)


def _is_known(kind: Any) -> bool:
    """Whether this library and transformers know a `model_type`."""
    return isinstance(kind, str) and kind in CONFIG_MAPPING and is_registered(kind)


def _config_entries(where: str, place: Mapping[str, Any]) -> dict[str, Any]:
    reason: object = "there is no config.json"
    try:
        entries, _ = PreTrainedConfig.get_config_dict(where, **place)
    except Exception as error:  # noqa: BLE001 (whatever is wrong with the file: it is not what was expected)
        entries, reason = {}, error
    if not entries or not isinstance(entries, dict):
        raise CheckpointError(
            f"{where}: expected a model folder with a readable config.json, or a name on the hub: {str(reason).rstrip('. ')}. "
            "Check the path, or save the model again"
        )
    return dict(entries)


def _check_trusted(where: str, entries: Mapping[str, Any], kwargs: Mapping[str, Any], place: Mapping[str, Any]) -> None:
    """Refuse what would run or read more than the files of the folder, or computes nothing."""
    asked = "attn_implementation" in kwargs or kwargs["trust_remote_code"]
    for name, value in _items(entries):
        if isinstance(value, float) and isnan(value):
            raise CheckpointError(f"{where}: config.json says {name} is no number (NaN). {DAMAGED}")
        if name.endswith("_implementation") and not asked and not set(_texts(value)) <= {"eager", "sdpa", "flex_attention"}:
            raise CheckpointError(
                f"{where}: config.json wants {name}={value!r}, which may be code from the hub; it is not loaded unless you ask "
                'for it: liar.load(folder, attn_implementation="…")'
            )
    if cached_file(where, "adapter_config.json", **place, **QUIET) is not None:
        raise CheckpointError(
            f"{where}: expected a model, got an adapter (adapter_config.json): load it with PEFT, merge it "
            "(model.merge_and_unload()), and save the model that results"
        )


def _texts(value: Any) -> Iterator[str]:
    """A text, or those in a mapping."""
    if isinstance(value, Mapping):
        for each in value.values():
            yield from _texts(each)
    elif value is not None:
        yield str(value)


def _items(entries: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """All entries, those of nested configurations too."""
    for name, value in entries.items():
        yield str(name), value
        if isinstance(value, Mapping):
            yield from _items(value)


def _named_class(names: Any, config: type[PreTrainedConfig] | None = None) -> type[PreTrainedModel] | None:
    """The class that `architectures` names, if transformers has it.

    Raises:
        CheckpointError: it is of another family than the configuration.
    """
    if names is None or names == []:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"architectures={names!r}: expected a list with the name of a class of transformers")
    actual = getattr(transformers, names[0], None)
    if not isinstance(actual, type) or not issubclass(actual, PreTrainedModel):
        return None
    if config is not None and actual.config_class is not config:
        raise CheckpointError(f"architectures={names!r}: expected a class for a {config.__name__}, which {names[0]} is not")
    return actual


def _check_blocks(config: PreTrainedConfig, shapes: Shapes, where: str) -> None:
    """Compare the number of blocks in the file with the configuration's before a model is built: it may be any number."""
    for stack, names in zip(family_for(config).stacks, DEPTHS, strict=False):
        blocks = re.escape(stack.blocks)
        found = {match[1] for name in shapes for match in re.finditer(rf"(?:^|\.){blocks}\.(\d+)\.", name)}
        expected = next((getattr(config, name) for name in names if hasattr(config, name)), None)
        if found and isinstance(expected, int) and expected != len(found):
            raise CheckpointError(f"{where}: config.json says {expected} blocks, the weights have {len(found)}. {DAMAGED}")


def _check_complete(
    model: PreTrainedModel, info: Mapping[str, Any], where: str, *, another_head: bool, shortened: bool
) -> None:
    """Check that every tensor of the file has a place, and every weight of the model came from the file.

    Another head than the file's may be new, with the part of the body that only heads read (a pooler). Buffers that earlier
    versions of a class had may be left over.
    """
    _, prefix = base_and_prefix(model)
    blocks = [f".{stack.blocks}." for stack in stacks_of(model, family_of(model))]
    missing, left_over = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    parts = tuple(f"{prefix}{part}." for part in OPTIONAL_PARTS.values())
    new = [name for name in missing if another_head and prefix and (not name.startswith(prefix) or name.startswith(parts))]
    cut = {f"{site.block}.{edge.module}" for site in layout_of(model).sites for edge in site.edges}
    if wrong := sorted(name for name, *_ in info["mismatched_keys"] if name.rpartition(".")[0] in cut):
        raise CheckpointError(f"{where}: expected the shapes of the model's layers, {_listed(wrong)} have others. {DAMAGED}")
    if lost := [name for name in missing if name not in new]:
        raise CheckpointError(f"{where}: expected a tensor for every weight, {_listed(lost)} missing. {DAMAGED}")
    unread = [
        name for name in left_over if any(stack in f".{name}" for stack in blocks) and name.endswith((".weight", ".bias"))
    ]
    if unread and not shortened:
        raise CheckpointError(
            f"{where}: expected a layer for every tensor of the blocks, there is none for {_listed(unread)} (config.json says "
            f"{len(layout_of(model).blocks)} blocks). {DAMAGED}"
        )
    if new or left_over:
        logger.warning(
            "%s as %s: new, at random values: %s; not used: %s",
            where, type(model).__name__, _listed(new) or "nothing", _listed(left_over) or "nothing",
        )  # fmt: skip


def _check_record(model: PreTrainedModel, where: str, place: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Compare the model with what `liar.json` says, where there is one."""
    path = cached_file(where, "liar.json", **place, **QUIET)
    if path is None:
        return
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        expected = {name: site["units"] for name, site in record["sites"].items()}
        saved_class = record.get("class")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected the units of every site, got {error!r}; {DAMAGED}") from error
    known = isinstance(saved_class, str) and isinstance(getattr(transformers, saved_class, None), type)
    if known and saved_class != type(model).__name__ and "architectures" not in fields:
        raise CheckpointError(
            f"{where}: liar.json says {saved_class}, config.json {model.config.architectures}. {DAMAGED}. If another program "
            "has saved the folder since, remove liar.json"
        )
    actual = {site.name: site.units for site in layout_of(model).sites}
    if expected != actual:
        wrong = [name for name in [*actual, *expected] if expected.get(name) != actual.get(name)]
        raise CheckpointError(
            f"{where}: liar.json says {expected.get(wrong[0], 'no')} units at {wrong[0]}, the weights have "
            f"{actual.get(wrong[0], 'none')}. If another program has saved the folder since, remove liar.json; else it is "
            "damaged"
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
