"""Measure a trained model, or two: `python jobs/evaluate.py MODEL [--data PICTURES] [--compare MODEL]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

# See jobs/train.py.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cvdist.jobs import cli


def main(arguments: Sequence[str]) -> None:
    """Parse, evaluate, report."""
    config = cli.parse_evaluate(arguments)
    if config is None:
        return
    from cvdist.jobs import console, evaluate

    cli.show(console.evaluation_table(evaluate.run(config)))


if __name__ == "__main__":
    sys.exit(cli.main(main))
