"""The structure as data: imports point one way, the public names are what they are, and every example in a docstring runs."""

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

# Each package (or single file) imports only from those before it.
ORDER = (
    "errors",
    "files",
    "templates",
    "versions",
    "verdicts",
    "options",
    "progress",
    "models",
    "data",
    "statistics",
    "solve",
    "runtime",
    "generation",
    "mask",
    "surgery",
    "analysis",
    "report",
    "repair",
    "unstructured",
    "selection",
    "io",
    "planning",
    "api",
    "testing",
    "tracing",
    "cli",
    "__main__",
)
# Tensors only: packages of mathematics know neither models nor data, so nothing but what is listed here.
PURE = {
    "errors": set(),
    "files": {"errors"},
    "templates": set(),
    "verdicts": set(),
    "options": {"errors"},
    "statistics": {"errors"},
    "solve": {"errors", "statistics", "verdicts"},
}

PUBLIC = (
    "Calibration",
    "Costs",
    "CriterionStatistics",
    "Family",
    "FusedProducer",
    "HeadArgument",
    "Interpolation",
    "LiarError",
    "Mask",
    "Plan",
    "ProgressUpdate",
    "Report",
    "SelfGenerated",
    "SitePattern",
    "Stack",
    "Verdict",
    "calibration",
    "collect",
    "discover",
    "families",
    "flops",
    "interpolation",
    "latency",
    "load",
    "make_standalone",
    "moments",
    "plan",
    "plot",
    "propose_family",
    "prune",
    "reconstruct",
    "refine",
    "register",
    "remove",
    "save",
    "select",
    "self_generate",
)
ROOT = Path(liar.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))


def module_name(file):
    parts = ["liar", *file.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package(module):
    return module.split(".")[1] if "." in module else ""


def imported(source):
    """Full names of the modules of this library that a source text imports, wherever the import stands."""
    modules = {module_name(file) for file in FILES}
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.split(".")[0] == "liar"}
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            if node.module and node.module.split(".")[0] == "liar":
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= {name if name in modules else node.module for name in full}
    return names


def backward(own, names):
    """The imports of a package that do not point to one before it; `liar` itself stands behind all."""
    allowed = ORDER[: ORDER.index(own) + 1]
    return {name for name in names if package(name) not in allowed}


def test_every_file_is_in_a_package():
    assert {package(module_name(file)) for file in FILES} - {""} == set(ORDER)


@pytest.mark.parametrize("file", [file for file in FILES if package(module_name(file))], ids=module_name)
def test_imports_point_one_way(file):
    assert not backward(package(module_name(file)), imported(file.read_text(encoding="utf-8")))


def test_a_backward_import_is_seen():
    lines = ("from liar.api import COSTS", "import liar", "from liar import surgery", "from liar.errors import LiarError")
    source = "def f():\n    " + "\n    ".join(lines)
    assert imported(source) == {"liar.api", "liar", "liar.surgery", "liar.errors"}
    assert backward("solve", imported(source)) == {"liar.api", "liar", "liar.surgery"}
    assert backward("cli", imported(source)) == {"liar"}


def test_files_do_not_import_each_other_in_circles():
    """Inside a package as well: it may not be imported by its own parts."""
    graph = {module_name(file): imported(file.read_text(encoding="utf-8")) for file in FILES}
    assert set(TopologicalSorter(graph).static_order()) == set(graph)
    with pytest.raises(CycleError):
        list(TopologicalSorter({**graph, "liar.errors": {"liar.api"}}).static_order())


@pytest.mark.parametrize("name", PURE)
def test_mathematics_knows_tensors_only(name):
    sources = [file.read_text(encoding="utf-8") for file in FILES if package(module_name(file)) == name]
    used = {package(module) for source in sources for module in imported(source)} - {name}
    assert used <= PURE[name]
    assert not any("transformers" in source for source in sources)


def test_public_names():
    assert tuple(liar.__all__) == PUBLIC
    for name in PUBLIC:
        assert inspect.getdoc(getattr(liar, name)), name


def test_importing_is_cheap_and_quiet():
    """No plotting library and no command line come with the library, and nothing is printed."""
    names = "('matplotlib', 'typer', 'rich', 'datasets', 'liar.cli')"
    code = f"""
import sys, transformers
before = set(sys.modules)
import liar
print([name for name in {names} if name in sys.modules and name not in before])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["prune", "--help"], ["prune", "model"], ["latency", "--help"]]
)
def test_help_and_wrong_usage_need_no_torch(arguments):
    """They answer at once: what takes seconds to import is imported when there is work."""
    code = f"""
import sys
from liar.cli import app
try:
    app({arguments})
except SystemExit as end:
    print("code", end.code)
print([name for name in ("torch", "transformers", "scipy", "datasets") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[-2:] == [f"code {2 if arguments == ['prune', 'model'] else 0}", "[]"]


def test_public_names_are_imported_when_they_are_used():
    code = "import sys, liar; print('torch' in sys.modules); liar.prune; liar.runtime.exclusive; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
    assert set(liar.__all__) <= set(dir(liar))
    with pytest.raises(AttributeError, match="module 'liar' has no attribute 'pruned'"):
        _ = liar.pruned


def test_the_library_works_without_the_extras():
    """Without rich, typer, datasets and matplotlib a model is pruned, and its report printed as plain text."""
    code = """
import transformers, sys
for name in ("rich", "rich.console", "rich.table", "typer", "datasets", "matplotlib", "matplotlib.figure"):
    sys.modules[name] = None
import liar
from liar.testing import tiny_model, tiny_batches
model = tiny_model("bert")
report = liar.prune(model, tiny_batches(model), keep=0.5, progress=False)
print(report)
try:
    next(liar.data.texts("a dataset"))
except liar.LiarError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    title, headings, *rest = done.stdout.splitlines()
    assert "of the block parameters kept (50.0% requested)" in title
    assert headings.split("\t")[:3] == ["site", "kept", "of"]
    assert [line.split("\t")[0] for line in rest[:4]] == ["heads.0", "neurons.0", "heads.1", "neurons.1"]
    assert 'needs the package datasets, which is not installed: pip install "liar-prune[cli]"' in rest[-1]


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
def test_examples_run(name, tmp_path, monkeypatch, tokenizer, criteria, registry):
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


def test_a_wrong_example_is_seen():
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    told = []
    doctest.DocTestRunner().run(test, out=told.append)
    assert told
