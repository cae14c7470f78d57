"""Write a trained model for other programs: `python jobs/export.py MODEL --format onnx --output FILE`."""

from __future__ import annotations

import sys
from pathlib import Path

# The package beside this folder is the one that runs: in a clone, in the image, and in the folder that
# `ray job submit --working-dir .` uploads, installed or not. In place of this folder, whose inspect.py would
# hide the standard library's.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cvdist.jobs import cli

if __name__ == "__main__":
    sys.exit(cli.run_job("export"))
