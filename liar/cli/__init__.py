"""The command line: one file per subcommand, with options made from `liar.options`."""

from liar.cli import calibrate, families, latency, plan, prune, reconstruct, refine, replay, report, select  # noqa: F401 (each registers itself)
from liar.cli.app import app, main

__all__ = ["app", "main"]
