"""Try settings, train the best: `python jobs/sweep.py RECIPE --trials N [--search FLAG=RANGE ...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

# See jobs/train.py.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cvdist.errors import UserError
from cvdist.jobs import cli


def main(arguments: Sequence[str]) -> None:
    """Parse, try, train the best, report."""
    job = cli.parse_sweep(arguments)
    if job is None:
        return
    from cvdist.jobs import console, sweep

    finished = sweep.run(job)
    cli.show(console.sweep_table(finished))
    if finished.trained is not None and finished.trained.not_registered:
        raise UserError(finished.trained.not_registered)


if __name__ == "__main__":
    sys.exit(cli.main(main))
