"""The command line in this process: exit code 0, 1 or 2, a short message where it is not 0, and no traceback."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from typer.testing import CliRunner
from unchanged import attempt

from liar import LiarError
from liar.cli import app


def command(*arguments: Any, folder: Path) -> Any:
    """What a command prints, or `Refused`; in any case everything in `folder` is as before unless it succeeds."""

    def call() -> str:
        done = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert "Traceback" not in done.output
        if done.exit_code in (1, 2):
            # Without the frames around it, and what was printed before.
            shown = re.sub(r"[\u2500-\u257f]", " ", done.stderr)
            raise LiarError(" ".join(re.split("(?=Error: |Usage: )", shown, maxsplit=1)[-1].split()))
        assert done.exit_code == 0, f"exit code {done.exit_code}"
        return done.stdout

    return attempt(call, folder=folder, changes=True)
