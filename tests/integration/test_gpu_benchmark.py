"""The GPU's benchmark, all of it on a processor with small sizes; and that it is skipped in one line."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import gpu
from tests.helpers.jobs import run

_SCRIPT = """
import json, sys
sys.modules["ray"] = sys.modules["mlflow"] = None  # importing them is an error
import torch
from benchmarks import gpu
print(json.dumps([one.to_dict() for one in gpu.all_on(torch.device("cpu"), gpu.tiny(), sys.argv[1:])]))
"""


def test_it_runs_without_ray_and_mlflow(tmp_path):
    done = run(
        *(sys.executable, "-c", _SCRIPT, "machine", "extraction", "epochs"),
        storage=tmp_path,
        TMPDIR=str(tmp_path),
        OMP_NUM_THREADS="2",
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert {one["unit"] for one in results} == {"pictures/s", "seconds", "TFLOP/s"}
    assert all(one["ours"] > 0 and one["other"] > 0 for one in results)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_is_skipped_in_one_line(capsys):
    assert list(gpu.measure()) == []
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("  skipped: ") and ("GPU" in line or "CUDA" in line)
