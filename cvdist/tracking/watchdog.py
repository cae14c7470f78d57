"""`python -m cvdist.tracking.watchdog URI RUN_ID JOB`: ends a run whose owner died without a word.

Waits for the end of its standard input, which comes when the owner says `ended` or is gone, be it by SIGKILL.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Wait for the owner; mark the run and its trials killed unless the owner has ended it."""
    uri, run_id, job = sys.argv[1:]
    if sys.stdin.read().strip() == "ended":
        return
    from cvdist.tracking.run import end_children, end_run, mlflow_client

    if mlflow_client(uri).get_run(run_id).info.status == "RUNNING":
        end_children(uri, run_id, "KILLED", job)
        end_run(uri, run_id, "KILLED", job)


if __name__ == "__main__":
    main()
