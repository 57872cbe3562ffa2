"""What mkdocs does beside its configuration: the navigation, and pages that lie outside of this folder.

The navigation is the list of pages in index.md: a heading is a section, the first column of its table holds the pages. Pages of
the repository that are not in this folder are taken into the site as they are; their links, and the links to them, are made
to fit.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

DOCS = Path(__file__).parent
ROOT = DOCS.parent
# Path in the repository -> path in the site.
OUTSIDE = {"benchmarks/README.md": "benchmarks.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
ENTRY = re.compile(r"^## (?P<section>.+)$|^\| \[(?P<title>[^\]]+)\]\((?P<page>[^)]+)\)", re.MULTILINE)
LINK = re.compile(r"(?P<before>\]\()(?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> None:
    """Make the navigation from index.md."""
    sections: dict[str, list[dict[str, str]]] = {}
    for entry in ENTRY.finditer((DOCS / "index.md").read_text(encoding="utf-8")):
        if entry["section"]:
            pages = sections[entry["section"]] = []
        else:
            pages.append({entry["title"]: in_site(posixpath.normpath(f"docs/{entry['page']}"))})
    config.nav = [{"Overview": "index.md"}, *({title: pages} for title, pages in sections.items() if pages)]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Take in the pages from outside."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Make links fit: in the repository they go from file to file, in the site from page to page."""
    uri = page.file.src_uri
    source = next((path for path, name in OUTSIDE.items() if name == uri), f"docs/{uri}")

    def fitted(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link["path"]))
        path = posixpath.relpath(in_site(target), posixpath.dirname(uri) or ".")
        return f"{link['before']}{path}{link['anchor'] or ''})"

    return LINK.sub(fitted, markdown)


def in_site(path: str) -> str:
    """Where a file of the repository is in the site."""
    return OUTSIDE.get(path, path.removeprefix("docs/"))
