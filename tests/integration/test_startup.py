"""What processes import at their start."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "slow"),
    [
        ("cvdist.jobs.train", ["torch", "ray", "mlflow"]),  # before Ray's processes are started
        ("cvdist.training.setup", ["torchvision", "torch._dynamo", "torch.distributed.tensor", "mlflow"]),
        ("cvdist.data.images.decode", ["torchvision"]),  # in each process that decodes
    ],
)
def test_a_process_imports_what_takes_seconds_only_when_it_needs_it(module, slow):
    script = f"import sys, {module}; print(*(name for name in {slow!r} if name in sys.modules))"
    imported = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert imported.split() == []
