"""What needs environments of its own: other releases of transformers, and the built package. `nox --session oldest`."""

import shutil
from pathlib import Path

import nox

# What depends on transformers most: tables, folders, cutting, repair.
TESTS = [f"tests/test_{name}.py" for name in ("models", "checkpoint", "surgery", "reconstruct")]

# What a user does first, in a folder where the repository's own liar is not found.
FIRST_USE = """
import liar
from liar.testing import tiny_batches, tiny_model

assert "site-packages" in liar.__file__, liar.__file__
model = tiny_model("bert")
report = liar.prune(model, tiny_batches(model), keep=0.5)
print(report)
liar.save(model, "smaller", report=report)
assert liar.discover(liar.load("smaller")) == liar.discover(model)
"""


@nox.session
def oldest(session: nox.Session) -> None:
    """With the oldest transformers that setup.cfg allows."""
    run_tests(session, "transformers==5.0.*")


@nox.session
def newest(session: nox.Session) -> None:
    """With the newest release."""
    run_tests(session, "transformers")


def run_tests(session: nox.Session, transformers: str) -> None:
    """Install what the Makefile installs, then another transformers with what it asks for, and run the tests."""
    pinned = ("--constraint", "constraints.txt")
    session.install(*pinned, "torch")
    session.install(*pinned, "--editable", ".[dev]")
    session.install("--upgrade", transformers)
    session.run("python", "-m", "pytest", *TESTS, *session.posargs)


@nox.session
def package(session: nox.Session) -> None:
    """Build the wheel and the sdist, and check what the index and citation programs read."""
    shutil.rmtree("dist", ignore_errors=True)
    session.install("--constraint", "constraints.txt", "build", "twine", "cffconvert")
    session.run("cffconvert", "--validate")
    session.run("python", "-m", "build")
    session.run("twine", "check", "--strict", *map(str, Path("dist").iterdir()))


@nox.session
@nox.parametrize("archive", ["*.whl", "*.tar.gz"], ids=["wheel", "sdist"])
def install(session: nox.Session, archive: str) -> None:
    """Install one of them where nothing else is, and use it."""
    (file,) = Path("dist").resolve().glob(archive)
    session.install("--constraint", "constraints.txt", "torch")
    session.install("--constraint", "constraints.txt", f"{file}[cli]")
    session.chdir(session.create_tmp())
    session.run("liar", "--version")
    session.run("python", "-c", FIRST_USE)
