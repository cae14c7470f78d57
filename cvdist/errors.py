"""Errors that the user can fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake or a missing thing that the user can fix.

    The message is one line that names the file or flag and the fix. Jobs print it without a traceback, and exit
    with `EXIT_USER_ERROR`. With `--debug` they print the traceback as well.
    """

    def __init__(self, message: str, *, on_all_workers: bool = False, transient: bool = False) -> None:
        """Create the error.

        Args:
            message: One line that names the file or flag and the fix.
            on_all_workers: Whether every worker of the run raises this error at the same place, so that no
                worker has to be told about it.
            transient: Whether the cause may be gone when the workers are started again.
        """
        super().__init__(message)
        self.on_all_workers = on_all_workers
        self.transient = transient


def did_you_mean(word: str, known: Iterable[str], otherwise: str) -> str:
    """Return a question with the known names that are most like `word`, or `otherwise` if there are none."""
    near = difflib.get_close_matches(word, list(known))
    return f"did you mean {' or '.join(near)}?" if near else otherwise


EXIT_USER_ERROR = 2
"""Exit code of a job that ended with a `UserError`."""


class Superseded(UserError):
    """Raised by an attempt of a run, or a job, when a newer one has begun and resumes from its checkpoints."""


def superseded_by_another_job(who: str = "") -> Superseded:
    """Create the error with which a job ends when a newer job of the same name has taken over its run.

    Args:
        who: Text that describes the newer job, beginning with a space. May be empty.
    """
    return Superseded(
        f"another job of this --name has begun{who} and goes on from the last checkpoint: this one stops. "
        "Jobs that run at the same time need different names",
        on_all_workers=True,
    )
