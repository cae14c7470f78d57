"""A job whose disk is full, in a mount namespace of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.helpers.jobs import call, run, the_error
from tests.helpers.network import reason_to_skip

pytestmark = pytest.mark.timeout(3600)  # waits end by themselves when nothing moves


def test_a_full_disk_is_one_line_and_leaves_the_checkpoints_before_it(tmp_path: Path) -> None:
    if reason := reason_to_skip():
        pytest.skip(reason)
    disk, cache = tmp_path / "disk", tmp_path / "cache"
    disk.mkdir()
    words = f"digits-cnn --runtime inline --tracking none --name full --batch-size 500 --storage {disk}"
    # There is room for some checkpoints; only inside the namespace can they be copied from there.
    inside = (
        f"mount -t tmpfs -o size=1000k tmpfs {disk} && "
        f"{sys.executable} jobs/train.py {words} --epochs 9 --keep-checkpoints 9; code=$?; "
        f"cp -r {disk}/full {tmp_path}/kept; exit $code"
    )
    done = run("unshare", "--mount", "bash", "-c", inside, storage=tmp_path, CVDIST_CACHE=str(cache))
    assert "could not be written: No space left on device" in the_error(done)
    kept = sorted(path.name for path in (tmp_path / "kept").glob("epoch-*"))
    assert kept and all((tmp_path / "kept" / name / "checkpoint.json").exists() for name in kept)
    (tmp_path / "kept").rename(disk / "full")
    again = call(
        "train", *words.split(), "--epochs", str(len(kept) + 1), storage=tmp_path, CVDIST_CACHE=str(cache)
    )
    assert again.returncode == 0 and f"{len(kept)} epochs done" in again.stderr, again.stderr
