"""What all fuzz tests run in: an own working directory and home, no network, and not all of the memory."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import datasets
import folders
import huggingface_hub
import pytest
import strategies

# Bytes above what the process has already: an input may ask for a model of any size.
MEMORY = 4 << 30


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An empty folder that everything has to stay in; the working directory is two levels below it, the home is between."""
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def home(place):
    """The same folder, filled."""
    folders.fill(place)
    return place


@pytest.fixture(scope="module", autouse=True)
def _isolated(place, tmp_path_factory):
    below = place / "one" / "two"
    below.mkdir(parents=True)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if sys.platform == "linux" else None
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(below)
        patch.setenv("HOME", str(place / "one"))
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        if used is not None:
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
        yield
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module", autouse=True)
def _progress(request):
    """Let long runs say how far they are."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def tell(text: str) -> None:
        with capture.global_and_fixture_disabled():
            print(text, end="", file=sys.stderr, flush=True)  # noqa: T201 (this is the progress)

    strategies.tell.append(tell)
    yield
    strategies.tell.pop()
