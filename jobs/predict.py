"""Classify pictures with a trained model: `python jobs/predict.py MODEL --data PICTURES --output URI`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

# See jobs/train.py.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cvdist.jobs import cli


def main(arguments: Sequence[str]) -> None:
    """Parse, predict, report."""
    config = cli.parse_predict(arguments)
    if config is None:
        return
    from cvdist.jobs import console, predict

    cli.show(console.predictions_table(predict.run(config)))


if __name__ == "__main__":
    sys.exit(cli.main(main))
