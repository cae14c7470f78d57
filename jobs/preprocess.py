"""Compute a model's frozen layers once: `python jobs/preprocess.py RECIPE --data PICTURES --features URI`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

# See jobs/train.py.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cvdist.jobs import cli


def main(arguments: Sequence[str]) -> None:
    """Parse, extract or look, report."""
    asked = cli.parse_preprocess(arguments)
    if asked is None:
        return
    if isinstance(asked, cli.CacheCommand):
        from cvdist.features import inspect

        if asked.how == "check":
            print(inspect.check(asked.uri))
        elif asked.how == "describe":
            print(inspect.describe(asked.uri))
        else:
            pruned = inspect.prune(asked.uri)
            print(f"deleted {pruned.files} files, {pruned.bytes / 1e6:,.1f} MB")
        return
    from cvdist.jobs import console
    from cvdist.jobs.train import preprocess

    cli.show(console.features_table(preprocess(asked)))


if __name__ == "__main__":
    sys.exit(cli.main(main))
