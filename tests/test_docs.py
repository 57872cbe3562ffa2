"""The pages keep their word: snippets and command lines run, links lead somewhere, the API page lists what there is.

Blocks marked `python` run one after another in one namespace per page; lines `$ liar …` in `console` blocks go through the
command line in between. All of it in an empty folder and without a network.
"""

import ast
import doctest
import importlib
import inspect
import re
import shlex
import socket
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import liar
from benchmarks import publish, tutorials
from liar import options, testing
from liar.cli import app
from liar.models import registry

ROOT = Path(__file__).resolve().parents[1]
API = ROOT / "docs" / "api.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
# They take longer: `make tutorials`.
TUTORIALS = set((ROOT / "docs" / "tutorials").glob("*.md"))
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<text>.*?)^```\s*$", re.MULTILINE | re.DOTALL)
HUB = ("sentence-transformers/all-MiniLM-L6-v2",)
NOT_OURS = ("pip", "make", "git")
# An absolute path: a slash in front of a name, after a blank, a quote, a bracket or at the start of a line; or a drive.
ABSOLUTE = re.compile(r"(?:^|[\s\"'`(=\[])(?:file://|~/|/(?=[A-Za-z_.]))[\w./-]+|\b[A-Z]:\\", re.MULTILINE)


RUN_HERE = [page for page in PAGES if page not in TUTORIALS and FENCE.search(page.read_text(encoding="utf-8"))]


@dataclass(frozen=True)
class Block:
    info: str
    text: str
    line: int


def name(page):
    return page.relative_to(ROOT).as_posix()


def blocks(text):
    return [Block(m["info"].strip(), m["text"], text[: m.start()].count("\n") + 1) for m in FENCE.finditer(text)]


def prose(page):
    """The text of a page without its blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def commands(text):
    """The lines after a prompt, with those that a backslash continues."""
    return [line[2:].strip() for line in text.replace("\\\n", " ").splitlines() if line.startswith("$ ")]


def anchors(page):
    """Headings as GitHub makes links of them."""
    headings = re.findall(r"^#+ +(.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def wrong_links(page):
    links = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(page))
    for link in links:
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        target = (page.parent / path).resolve() if path else page
        known = target.exists() and target.is_relative_to(ROOT)
        if not known or (anchor and anchor not in anchors(target)):
            yield link


def execute(source, page, line, namespace):
    # Blank lines in front, so that a traceback shows the line of the page.
    exec(compile("\n" * line + source, name(page), "exec", dont_inherit=True), namespace)


def call(line):
    program, *arguments = shlex.split(line, comments=True)
    if program in NOT_OURS:
        return
    assert program == "liar", f"{line!r}: only liar can be run here, and {', '.join(NOT_OURS)} are passed over"
    done = CliRunner().invoke(app, arguments)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, f"{line!r}: {done.output}"


@pytest.fixture
def _isolated(tmp_path, tmp_path_factory, monkeypatch, criteria):
    """An empty folder, no network, quick timings, and what a page registers is forgotten after it."""

    def refuse(*_):
        raise OSError("the docs run without a network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    timing = importlib.import_module("liar.selection.budget.latency")
    monkeypatch.setattr(timing, "ROUNDS", 3)
    monkeypatch.setattr(timing, "SECONDS", 0.005)
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))


@pytest.mark.usefixtures("_isolated")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page not in TUTORIALS and blocks(page.read_text("utf-8"))], ids=name
)
def test_blocks_run(page, request):
    text = page.read_text(encoding="utf-8")
    local = str(request.getfixturevalue("minilm_folder")) if any(hub in text for hub in HUB) else ""
    namespace = {"__name__": "__main__"}
    for block in blocks(text):
        source = block.text
        for hub in HUB:
            source = source.replace(hub, local)
        if block.info == "python":
            execute(source, page, block.line, namespace)
        if block.info == "console":
            for line in commands(source):
                call(line)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_example_is_marked_so_that_it_runs(page):
    for block in blocks(page.read_text(encoding="utf-8")):
        language = block.info.split()[0].lower() if block.info else ""
        assert language not in {"py", "python3", "pycon"}, block
        assert language != "python" or block.info == "python", block
        assert language == "console" or not commands(block.text), block
        assert language != "console" or commands(block.text), block


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_command_lines_that_are_only_shown_have_known_options(page):
    """Lines without a prompt, such as those that need a model which is not here."""
    known = typer.main.get_command(app).commands
    for block in blocks(page.read_text(encoding="utf-8")):
        for line in re.findall(r"^liar (.+)$", block.text if block.info == "text" else "", re.MULTILINE):
            command, *arguments = shlex.split(line, comments=True)
            options = {option for parameter in known[command].params for option in parameter.opts}
            assert {a for a in arguments if a.startswith("--")} <= options, line


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    assert list(wrong_links(page)) == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_absolute_paths(page):
    assert ABSOLUTE.findall(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", sorted(TUTORIALS), ids=name)
def test_tutorials_show_the_output_of_their_code(page):
    """`python -m benchmarks.tutorials` writes it."""
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"^<!-- run: (\w+) -->$", text, re.MULTILINE) == [tutorials.fingerprint(text)]
    assert tutorials.fingerprint(text.replace("import liar\n", "import liar  # changed\n", 1)) != tutorials.fingerprint(text)


def test_every_page_is_on_the_map():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        assert page.name == "index.md" or f"({page.relative_to(ROOT / 'docs').as_posix()})" in index, name(page)


def test_contributing_is_short():
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) < 60


def test_changelog_and_citation_have_this_version():
    version = re.search(r"^version = (.+)$", (ROOT / "setup.cfg").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def sections():
    """Name -> text of every section of the API page."""
    text = API.read_text(encoding="utf-8")
    parts = re.split(r"^## `liar\.(\w+)`$", text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def described(text):
    """The names in the table of a section."""
    return list(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))


def as_written(text):
    """Parameters in a section's signature: name, kind, and the text of the default."""
    (block,) = [block for block in blocks(text) if block.info == "text"]
    found = ast.parse(f"def {block.text.strip()}: pass").body[0].args
    positional = [*found.posonlyargs, *found.args]
    defaults = [None] * (len(positional) - len(found.defaults)) + found.defaults
    pairs = [(a.arg, "POSITIONAL_OR_KEYWORD", d) for a, d in zip(positional, defaults, strict=True)]
    pairs += [(a.arg, "KEYWORD_ONLY", d) for a, d in zip(found.kwonlyargs, found.kw_defaults, strict=True)]
    pairs += [(found.kwarg.arg, "VAR_KEYWORD", None)] if found.kwarg else []
    return [(n, kind, ast.unparse(d) if d else None) for n, kind, d in pairs]


def as_it_is(thing):
    def default(value):
        if value is inspect.Parameter.empty:
            return None
        return "dict()" if "factory" in repr(value) else repr(value)

    return [(p.name, p.kind.name, default(p.default)) for p in inspect.signature(thing).parameters.values()]


def test_api_page_lists_the_public_names():
    assert sorted(sections()) == sorted(liar.__all__)


@pytest.mark.parametrize("public", [n for n in liar.__all__ if n not in {"LiarError", "Verdict"}])
def test_api_page_has_the_signatures(public):
    assert as_written(sections()[public]) == as_it_is(getattr(liar, public))


MEMBERS = (
    "Calibration",
    "Costs",
    "CriterionStatistics",
    "Interpolation",
    "Mask",
    "Plan",
    "ProgressUpdate",
    "Report",
    "SelfGenerated",
)


@pytest.mark.parametrize("public", MEMBERS)
def test_api_page_has_the_members(public):
    thing = getattr(liar, public)
    members = {n for n in [*vars(thing), *thing.__dataclass_fields__] if not n.startswith("_")}
    assert sorted(described(sections()[public])) == sorted(members)


def entries():
    """Name -> the file of the reference that describes it, from its docstring."""
    files = sorted((ROOT / "docs" / "reference").glob("*.md"))
    return {
        entry: file for file in files for entry in re.findall(r"^::: (\S+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    }


def thing_of(path):
    """What a dotted name stands for."""
    module, _, attribute = path.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def named_on(page):
    """Functions and classes of packages of the library that a page imports or mentions: dotted names."""
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"`(liar\.\w+\.\w+)`", text))
    for block in blocks(text):
        if block.info == "python":
            for node in ast.walk(ast.parse(block.text)):
                if isinstance(node, ast.ImportFrom) and re.fullmatch(r"liar\.\w+", node.module or ""):
                    named |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {path for path in named if inspect.isclass(thing_of(path)) or inspect.isfunction(thing_of(path))}


def public_names():
    """All that users are told of: names of the library, of its tests for families, and what pages name beside them."""
    return {
        *(f"liar.{name}" for name in liar.__all__),
        *(f"liar.testing.{name}" for name in testing.__all__),
        *(f"liar.errors.{kind.__name__}" for kind in liar.LiarError.__subclasses__()),
        *(path for page in PAGES for path in named_on(page)),
    }


def test_the_reference_has_every_public_name():
    assert public_names() - set(entries()) == set()


@pytest.mark.parametrize("path", entries())
def test_every_entry_has_an_example_that_runs(path):
    """`test_flow.py` runs the examples of all docstrings; those marked as skipped do not count."""
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(thing_of(path)) or "")
    assert [example for example in examples if not example.options.get(doctest.SKIP)], path


def test_what_pages_name_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("`liar.solve.fit`, `liar.selection.STATISTICS`\n```python\nfrom liar.repair import SiteState\n```\n")
    assert named_on(page) == {"liar.solve.fit", "liar.repair.SiteState"}


def test_api_page_has_the_options():
    """`python -m benchmarks.publish` writes the tables."""
    text = API.read_text(encoding="utf-8")
    assert publish.filled(text) == text
    named = " ".join(re.findall(r"<!-- options: (.+) -->", text)).split()
    assert sorted(named) == sorted(name for name in vars(options) if name.endswith("Options"))
    changed = text.replace("| `round_to` | `1` |", "| `round_to` | `2` |")
    assert changed != text == publish.filled(changed)


def test_api_page_has_the_verdicts_and_errors():
    numerics = (ROOT / "docs" / "numerics.md").read_text(encoding="utf-8")
    for verdict in liar.Verdict:
        assert f"`{verdict.value}`" in sections()["Verdict"]
        assert f"| `{verdict.value}` |" in numerics
    for kind in liar.LiarError.__subclasses__():
        assert f"`{kind.__name__}`" in sections()["LiarError"]


@pytest.mark.parametrize("thing", ["Family", "FusedProducer", "HeadArgument", "SitePattern"])
def test_extending_explains_every_field(thing):
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    (section,) = re.findall(rf"^### The fields of `{thing}`$(.*?)^##", text, re.MULTILINE | re.DOTALL)
    assert described(section) == list(getattr(liar, thing).__dataclass_fields__)


def test_what_is_wrong_on_a_page_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("# A page\n[a](#a-page) [b](page.md#b) [c](none.md) [d](../out.md) [e](https://example.org/x)\n")
    assert list(wrong_links(page)) == ["page.md#b", "none.md", "../out.md"]
    for text in ("see `/opt/x`", "/srv/y", "in ~/models", r"C:\models", 'open("/tmp/x")'):
        assert ABSOLUTE.findall(text), text
    for text in ("and/or", "a / b", "https://example.org/x", "models/slim", "./llama", "1/2", "`hidden_size / heads`"):
        assert not ABSOLUTE.findall(text), text
    assert commands("$ liar prune a \\\n    b\noutput\n$ make test\n") == ["liar prune a      b", "make test"]
    with pytest.raises(AssertionError, match="only liar can be run"):
        call("rm -r x")
    with pytest.raises(AssertionError, match="liar report none"):
        call("liar report none")
    with pytest.raises(ZeroDivisionError) as caught:
        execute("1 / 0\n", page, 4, {})
    assert caught.traceback[-1].lineno + 1 == 5


def test_a_changed_number_is_seen(monkeypatch, tmp_path):
    """That the committed tables are current is tested in `test_benchmarks.py`."""
    text = publish.filled((ROOT / "README.md").read_text(encoding="utf-8"))
    changed = re.sub(r"(<!-- results: .*\n.*\n.*\n.*?\d\.)(\d)", lambda m: m[1] + str((int(m[2]) + 1) % 10), text, count=1)
    assert changed != text
    assert publish.filled(changed) == text
    page = tmp_path / "page.md"
    page.write_text(changed, encoding="utf-8")
    monkeypatch.setattr(publish, "pages", lambda: [page])
    assert publish.stale() == [page]


def test_the_security_page_names_tests_that_exist():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "security.md").read_text(encoding="utf-8")))
    written = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text("utf-8"), re.M)
    }
    assert len(named) > 15
    assert named <= written, named - written
