"""The floor plan as data: imports point one way, the public names are what they are, and every example in a docstring runs."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import torch

import liar
from liar.testing import tiny_batches, tiny_model

# Each room imports only from rooms that stand before it (docs: architecture).
ORDER = (
    "errors",
    "sites",
    "forms",
    "mask",
    "families",
    "costs",
    "batches",
    "statistics",
    "capture",
    "streams",
    "outputs",
    "loss",
    "gradients",
    "moments",
    "criteria",
    "sensitivity",
    "curves",
    "collect",
    "solve",
    "interpolation",
    "fold",
    "dropped",
    "slim",
    "timing",
    "report",
    "rebuild",
    "api",
    "testing",
    "atomic",
    "shapes",
    "checkpoint",
    "plots",
    "texts",
    "calibration",
    "run",
    "arguments",
    "cli",
)
# Tensors only: rooms of mathematics know neither models nor data, so nothing of what is listed here.
PURE = {
    "statistics": {"errors"},
    "solve": {"errors", "statistics"},
    "fold": {"errors", "solve"},
    "interpolation": {"errors", "solve", "statistics"},
    "errors": set(),
    "sites": set(),
}

PUBLIC = (
    "Costs",
    "Family",
    "Interpolation",
    "LiarError",
    "Mask",
    "Report",
    "SitePattern",
    "Statistics",
    "Verdict",
    "calibration",
    "collect",
    "families",
    "flops",
    "interpolation",
    "latency",
    "load",
    "moments",
    "plot",
    "prune",
    "reconstruct",
    "register",
    "save",
    "select",
)
ROOT = Path(liar.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))


def module_name(file):
    parts = ["liar", *file.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module):
    return module.split(".")[1] if "." in module else ""


def imported(source):
    """Full names of the modules of this library that a source text imports, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "liar"}
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            if node.module == "liar":
                found |= {f"liar.{alias.name}" if alias.name in ORDER else "liar" for alias in node.names}
            elif node.module and node.module.startswith("liar."):
                found.add(node.module)
    return found


def backward(own, names):
    """The imports of a room that do not point to a room before it; the package itself stands behind all rooms."""
    allowed = ORDER[: ORDER.index(own) + 1]
    return {name for name in names if room(name) not in allowed}


def test_every_file_is_in_a_room():
    assert {room(module_name(file)) for file in FILES} - {""} == set(ORDER)


@pytest.mark.parametrize("file", [file for file in FILES if room(module_name(file))], ids=module_name)
def test_imports_point_one_way(file):
    assert not backward(room(module_name(file)), imported(file.read_text(encoding="utf-8")))


def test_a_backward_import_is_seen():
    lines = ("from liar.api import select", "import liar", "from liar import slim", "from liar.errors import LiarError")
    source = "def f():\n    " + "\n    ".join(lines)
    assert imported(source) == {"liar.api", "liar", "liar.slim", "liar.errors"}
    assert backward("solve", imported(source)) == {"liar.api", "liar", "liar.slim"}
    assert backward("cli", imported(source)) == {"liar"}


def test_files_do_not_import_each_other_in_circles():
    """Inside a room as well: a package may not be imported by its own parts."""
    graph = {module_name(file): imported(file.read_text(encoding="utf-8")) for file in FILES}
    assert set(TopologicalSorter(graph).static_order()) == set(graph)
    with pytest.raises(CycleError):
        list(TopologicalSorter({**graph, "liar.errors": {"liar.api"}}).static_order())


@pytest.mark.parametrize("name", PURE)
def test_mathematics_knows_tensors_only(name):
    sources = [file.read_text(encoding="utf-8") for file in FILES if room(module_name(file)) == name]
    used = {room(module) for source in sources for module in imported(source)} - {name}
    assert used <= PURE[name]
    assert not any("transformers" in source for source in sources if name != "sites")


def test_public_names():
    assert tuple(liar.__all__) == PUBLIC
    for name in PUBLIC:
        assert inspect.getdoc(getattr(liar, name)), name


def test_importing_is_cheap_and_quiet():
    """No plotting library and no command line come with the library, and nothing is printed."""
    code = "import liar, sys; print([name for name in ('matplotlib', 'typer', 'datasets', 'liar.cli') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


MODULES = ["liar", *(info.name for info in pkgutil.walk_packages(liar.__path__, "liar."))]


def examples():
    """Every docstring with an example, of functions, classes, methods and modules, each once."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in MODULES:
        for test in finder.find(importlib.import_module(name), name):
            if test.examples:
                yield test


EXAMPLES = {test.name: test for test in examples()}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name, tmp_path, monkeypatch, tokenizer):
    """With a tiny model, calibration batches and an empty folder at hand, as the text around the examples assumes."""
    monkeypatch.chdir(tmp_path)
    test = EXAMPLES[name]
    model = tiny_model()
    test.globs = dict(test.globs, liar=liar, torch=torch, model=model, calib=tiny_batches(model), tokenizer=tokenizer)
    if "mask" not in {example.source.split(" = ")[0] for example in test.examples}:
        test.globs["mask"] = liar.select(model, keep=0.6, criterion="magnitude")
    told = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(test, out=told.append)
    assert not told, "".join(told)


@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "families"])
def test_every_public_name_shows_an_example(name):
    assert ">>> " in inspect.getdoc(getattr(liar, name))


def test_a_wrong_example_is_seen():
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    told = []
    doctest.DocTestRunner().run(test, out=told.append)
    assert told
