"""Which attempt may write, in a folder and in a bucket."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from cvdist.checkpoints.fence import Fence
from cvdist.errors import Superseded
from cvdist.runtime.processes import CheckpointFolder


@pytest.fixture(params=["folder", "bucket"])
def run_uri(request, tmp_path, monkeypatch):
    if request.param == "folder":
        return str(tmp_path / "run")
    for name, value in request.getfixturevalue("s3").items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{tmp_path.name}/run"


def test_the_newest_attempt_writes_and_no_other(run_uri):
    job = Fence.claim_job(run_uri, attempt=0)
    first = job.claim_attempt()
    first.require_newest()
    second = job.claim_attempt()  # the first one's node was lost, and it still runs
    second.require_newest()
    with pytest.raises(Superseded, match="was given up but still runs"):
        first.require_newest()
    assert (first.number, second.number) == (1, 2) and job.job_is_newest
    other = Fence.claim_job(run_uri, attempt=1)  # the same --name, while the first job still runs
    assert other.number == 3 and not job.job_is_newest
    for stale in (second.require_newest, job.claim_attempt):
        with pytest.raises(Superseded, match=r"another job of this --name has begun on .*: this one stops"):
            stale()
    assert len({first.suffix, second.suffix, other.suffix}) == 3 and first.suffix == ""


def test_jobs_that_start_at_the_same_moment_are_told_apart(run_uri):
    with ThreadPoolExecutor(4) as pool:
        jobs = list(pool.map(lambda _: Fence.claim_job(run_uri, attempt=1), range(4)))
    assert len({job.suffix for job in jobs}) == 4
    winners = []
    for job in jobs:
        try:
            job.require_newest()
            winners.append(job)
        except Superseded:
            pass
    assert [job.name for job in winners] == [max(job.name for job in jobs)]


def test_a_stale_attempt_can_not_touch_the_checkpoints(tmp_path):
    uri = str(tmp_path / "run")
    write = lambda text: lambda folder: (folder / "what").write_text(text)  # noqa: E731
    stale = CheckpointFolder(tmp_path / "run", 1, Fence.claim_job(uri, attempt=1))
    stale.add("epoch-0001", 0.5, write("old"))
    newer = CheckpointFolder(tmp_path / "run", 1, Fence.claim_job(uri, attempt=1))
    newer.add("epoch-0002", 0.6, write("new"))
    before = newer.newest()
    with pytest.raises(Superseded):
        stale.add("epoch-0002", 0.9, write("stale"))
    assert newer.newest() == before == ["epoch-0002-attempt-2.1"]
    assert (tmp_path / "run" / before[0] / "what").read_text() == "new"
