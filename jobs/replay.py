"""Deliver metrics that a job kept while MLflow was away: `python jobs/replay.py JOURNAL`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

# See jobs/train.py.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cvdist.errors import UserError
from cvdist.jobs import cli


def main(arguments: Sequence[str]) -> None:
    """Parse, deliver, report."""
    words = [word for word in arguments if word != "--debug"]
    if words in ([], ["-h"], ["--help"]):
        print("usage: [MLFLOW_TRACKING_URI=...] python jobs/replay.py JOURNAL   (as the job has named it)")
        return
    if len(words) != 1 or words[0].startswith("-"):
        raise UserError("jobs/replay.py takes one journal, a file or URI, and no flags")
    from cvdist.jobs.replay import replay

    done = replay(words[0])
    ended = ", and is marked as finished" if done.ended else ""
    print(f"run {done.run_id} has all {done.values} values of the journal{ended}")


if __name__ == "__main__":
    sys.exit(cli.main(main))
