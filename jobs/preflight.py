"""Is all there that a training job needs? `python jobs/preflight.py RECIPE [the job's flags]`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

# See jobs/train.py.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cvdist.jobs import cli


def main(arguments: Sequence[str]) -> int:
    """Parse, look, report; 1 if something is to be mended."""
    config = cli.parse_train(arguments, "preflight.py")
    if config is None:
        return 0
    from cvdist import config as configs
    from cvdist.jobs import preflight

    began = time.monotonic()
    configs.check(config)
    rows = preflight.check(config)
    print(preflight.table(rows, time.monotonic() - began))
    return int(any(row.problem for row in rows))


if __name__ == "__main__":
    sys.exit(cli.main(main))
