"""Train an image classifier: `python jobs/train.py RECIPE [--field value ...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

# The package beside this file is the one that runs: in a clone, in the image, and in the folder that
# `ray job submit --working-dir .` uploads, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cvdist.errors import UserError
from cvdist.jobs import cli


def main(arguments: Sequence[str]) -> None:
    """Parse, train, report."""
    config = cli.parse_train(arguments)
    if config is None:
        return
    from cvdist.jobs import console
    from cvdist.jobs.train import launch

    finished = launch(config)
    if finished is not None:
        cli.show(console.table(finished))
        if finished.not_registered:
            raise UserError(finished.not_registered)


if __name__ == "__main__":
    sys.exit(cli.main(main))
