"""Make a run's `report.html` anew, from what MLflow has: `python jobs/report.py RUN [--output FILE]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

# See jobs/train.py.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cvdist.jobs import cli


def main(arguments: Sequence[str]) -> None:
    """Parse, find the run, make its page, say where it is."""
    run, settings = cli.parse_report(arguments)
    from cvdist.jobs import report

    print(report.make(run, settings))


if __name__ == "__main__":
    sys.exit(cli.main(main))
