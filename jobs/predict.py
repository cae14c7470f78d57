"""Classify pictures with a trained model: `python jobs/predict.py MODEL --data PICTURES --output URI`."""

import sys
from pathlib import Path

# The package beside this folder runs, installed or not, and inspect.py does not hide the standard library's.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cvdist.jobs import cli

if __name__ == "__main__":
    sys.exit(cli.run_job("predict"))
