"""End a run whose owner was killed: `python -m cvdist.tracking.watchdog URI RUN_ID JOB`.

The owner of the run starts this process with a pipe as standard input. The pipe is closed when the owner has
ended the run, after it has written `ended`, or when the owner is gone, even by SIGKILL.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Wait for the owner, and mark the run and its trials as killed unless the owner has ended the run."""
    uri, run_id, job = sys.argv[1:]
    if sys.stdin.read().strip() == "ended":
        return
    from cvdist.tracking.run import end_children, end_run, mlflow_client

    if mlflow_client(uri).get_run(run_id).info.status == "RUNNING":
        end_children(uri, run_id, "KILLED", job)
        end_run(uri, run_id, "KILLED", job)


if __name__ == "__main__":
    main()
