"""Versions of what makes a result, without importing it."""

from __future__ import annotations

from importlib.metadata import version

PACKAGES = {"liar": "liar-prune", "torch": "torch", "transformers": "transformers"}


def versions() -> dict[str, str]:
    """Versions of this library, torch and transformers."""
    return {name: version(package) for name, package in PACKAGES.items()}
