"""Is all there that a training job needs? `python jobs/preflight.py RECIPE [the job's flags]`."""

import sys
from pathlib import Path

# The package beside this folder runs, installed or not, and inspect.py does not hide the standard library's.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cvdist.jobs import cli

if __name__ == "__main__":
    sys.exit(cli.run_job("preflight"))
