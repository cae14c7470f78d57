"""Show what a model has learned: `python jobs/visualize.py MODEL [--data PICTURES] [--layers NAMES]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

# See jobs/train.py.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cvdist.config import VisualizeJobConfig
from cvdist.jobs import cli

_ABOUT = (
    "Figures of what a model has learned: the filters of its convolutions and, with pictures, its activations, "
    "the pictures that activate its channels most, and Grad-CAM."
)


def main(arguments: Sequence[str]) -> None:
    """Parse, look, report."""
    config = cli.parse_model_job("visualize.py", arguments, VisualizeJobConfig, _ABOUT)
    if config is None:
        return
    from cvdist.jobs import console
    from cvdist.jobs.visualize import visualize

    cli.show(console.figures_table(visualize(config)))


if __name__ == "__main__":
    sys.exit(cli.main(main))
