"""The one kind of error that is the user's to mend."""


class UserError(Exception):
    """A mistake or a missing thing that the user can mend.

    The message is one line that names the file or flag and the fix. Jobs print it without a traceback
    and exit with `EXIT_USER_ERROR`; `--debug` shows the traceback as well.
    """

    def __init__(self, message: str, *, on_all_workers: bool = False, transient: bool = False) -> None:
        """Describe the error.

        Args:
            message: One line.
            on_all_workers: Whether every worker of the run raises it at the same place: none waits for another.
            transient: Whether the cause may be gone when the workers are started again.
        """
        super().__init__(message)
        self.on_all_workers = on_all_workers
        self.transient = transient


EXIT_USER_ERROR = 2


class Superseded(UserError):
    """A newer attempt of the run has begun; what this one has done is in its checkpoints."""


def superseded_by_another_job(who: str = "") -> Superseded:
    """The error with which a job ends when a newer job of the same name has taken over its run."""
    return Superseded(
        f"another job of this --name has begun{who} and goes on from the last checkpoint: this one stops. Give "
        "jobs that are to run side by side names of their own",
        on_all_workers=True,
    )
