"""Which attempt may write, in a folder and in a bucket."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from cvdist.checkpoints.fence import Fence
from cvdist.errors import Superseded


@pytest.fixture
def run_uri(root):
    return f"{root}/run"


def test_the_newest_attempt_writes_and_no_other(run_uri):
    job = Fence.claim_job(run_uri)
    first = job.claim_attempt()
    first.require_newest()
    second = job.claim_attempt()  # the first one's node was lost, and it still runs
    second.require_newest()
    with pytest.raises(Superseded, match="was given up but still runs"):
        first.require_newest()
    assert (first.number, second.number) == (1, 2)
    other = Fence.claim_job(run_uri).claim_attempt()  # the same --name, while the first job still runs
    assert other.number == 3
    for stale in (second.require_newest, job.claim_attempt):
        with pytest.raises(Superseded, match=r"another job of this --name has begun on .*: this one stops"):
            stale()
    assert len({first.suffix, second.suffix, other.suffix}) == 3 and first.suffix == ""


def test_jobs_that_start_at_the_same_moment_are_told_apart(run_uri):
    with ThreadPoolExecutor(4) as pool:
        jobs = list(pool.map(lambda _: Fence.claim_job(run_uri), range(4)))
    require_one_winner(jobs)


def test_attempts_of_a_job_that_start_at_the_same_moment_are_told_apart(run_uri):
    """As when Ray starts workers again before it has ended those that it was starting."""
    job = Fence.claim_job(run_uri)
    with ThreadPoolExecutor(4) as pool:
        attempts = list(pool.map(lambda _: job.claim_attempt(), range(4)))
    require_one_winner(attempts)


def require_one_winner(fences):
    assert len({fence.attempt for fence in fences}) == len({fence.suffix for fence in fences}) == 4
    winners = []
    for fence in fences:
        try:
            fence.require_newest()
            winners.append(fence)
        except Superseded:
            pass
    assert [fence.name for fence in winners] == [max(fence.name for fence in fences)]
