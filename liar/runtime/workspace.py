"""Where a run keeps what it computes: activations, and what it has finished."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from liar.errors import CheckpointError
from liar.files import user_path
from liar.options import RunOptions
from liar.runtime import distributed
from liar.runtime.journal import ACTIVATIONS, Journal, open_journal
from liar.runtime.places import OnDisk, OnHost, Place
from liar.runtime.store import ActivationStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Workspace:
    """Where activations go, and the journal of finished work; by default they stay where they are, and there is none.

    Attributes:
        place: of activations; None: where they were computed.
        journal: of the run; None: nothing is kept, and nothing is found.
        prefix: of the names of all entries, for a run in several rounds.
    """

    place: Place | None = None
    journal: Journal | None = None
    prefix: str = ""

    def new_store(self) -> ActivationStore:
        """An empty store for one walk."""
        return ActivationStore(self.place)

    def read(self, name: str) -> dict[str, Any] | None:
        """A finished entry, if there is one; of several processes the first one reads."""
        if self.journal is None:
            return None
        return distributed.answer(partial(self.journal.read, self.prefix + name))

    def commit(self, name: str, content: Mapping[str, Any]) -> None:
        """Note what is finished; of several processes the first one writes."""
        if self.journal is not None:
            distributed.answer(partial(self.journal.commit, self.prefix + name, content))

    def within(self, prefix: str) -> Workspace:
        """The same with entries of its own, for one of several rounds."""
        return replace(self, prefix=f"{self.prefix}{prefix}-")


# Nothing is kept.
IN_PLACE = Workspace()


@contextmanager
def open_workspace(
    options: RunOptions, verb: str, identity: Callable[[], Mapping[str, Any]], place: Callable[[], str]
) -> Iterator[Workspace]:
    """The workspace that some options ask for.

    Args:
        options: checked.
        verb: whose run it is; each has a folder of its own in the run folder.
        identity: what tells the run from others; called if it is kept.
        place: where activations fit; called for `activations="auto"`.

    Raises:
        CheckpointError: the run folder is of another run, or cannot be used.
    """
    activations = options.activations
    if activations == "auto":
        activations = distributed.answer(place)
        logger.info("activations are kept in this place: %s", activations)
    with ExitStack() as stack:
        journal = None
        if options.run_folder is not None:
            folder = user_path(options.run_folder) / verb
            # The others only know where it is, and wait until it is there.
            is_first = distributed.rank() == 0
            journal = stack.enter_context(open_journal(folder, identity())) if is_first else Journal(folder)
            distributed.gather(None)
        kept_in: Place | None = None
        if activations == "host":
            kept_in = OnHost()
        elif activations == "disk":
            kept_in = OnDisk(_folder_for_activations(journal, stack))
        try:
            yield Workspace(kept_in, journal)
        except KeyboardInterrupt:
            if journal is not None and journal.names():
                logger.warning(
                    "interrupted; what was finished is in %s: the same call with run_folder=%r goes on from there",
                    journal.folder, str(options.run_folder),
                )  # fmt: skip
            raise


def _folder_for_activations(journal: Journal | None, stack: ExitStack) -> Path:
    if journal is None:
        try:
            return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="liar-")))
        except OSError as error:
            raise CheckpointError(
                f"activations cannot be kept in the folder of temporary files: {error}; give a run_folder, or set "
                "TMPDIR to a folder that can be written"
            ) from error
    folder = journal.folder / ACTIVATIONS
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"activations cannot be kept in {folder}: {error.strerror or error}") from error
    return folder
