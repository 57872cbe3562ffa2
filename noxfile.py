"""The fast tests with the oldest and the newest transformers, each in an environment of its own: `nox --session oldest`."""

import nox

# What depends on transformers most: tables, folders, cutting, repair.
TESTS = [f"tests/test_{name}.py" for name in ("models", "checkpoint", "surgery", "reconstruct")]


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
