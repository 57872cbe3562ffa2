"""Every tutorial runs, prints where its page shows output, and takes less than three minutes of CPU time.

LIAR_TUTORIALS names the folders of models and data that are not in a package: "sst2-classifier=FOLDER sst2=FOLDER …".
"""

import os
import re
import time
from pathlib import Path

import pytest

from benchmarks import tutorials

SHARED = Path(__file__).resolve().parents[3] / "shared"
FOUND = {
    "stories260K": SHARED / "models" / "stories260K",
    "tinystories": SHARED / "data" / "tinystories",
    "sst2": SHARED / "data" / "sst2",
    **{name: Path(folder) for name, folder in (pair.split("=", 1) for pair in os.environ.get("LIAR_TUTORIALS", "").split())},
}
OUTPUT = re.compile(r'^```text title="output"$', re.MULTILINE)


@pytest.mark.parametrize("page", sorted(tutorials.PAGES.glob("*.md")), ids=lambda page: page.stem)
def test_a_tutorial_runs(page, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    missing = [name for name in tutorials.NEEDS.get(page.stem, ()) if not FOUND.get(name, tmp_path / name).is_dir()]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not on this machine: LIAR_TUTORIALS='{missing[0]}=FOLDER' names it")
    text, copy = page.read_text(encoding="utf-8"), tmp_path / page.name
    copy.write_text(text, encoding="utf-8")
    began = time.process_time()
    run = tutorials.run(copy, tutorials.MINILM | {name: FOUND[name] for name in tutorials.NEEDS.get(page.stem, ())})
    assert time.process_time() - began < 180
    assert len(OUTPUT.findall(run)) == len(OUTPUT.findall(text)) > 0
    assert tutorials.fingerprint(run) == tutorials.fingerprint(text)
