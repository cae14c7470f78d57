"""The store of checkpoints, in a folder and in a bucket of a real S3 server: the same contract for both."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cvdist.checkpoints import format as ckpt
from cvdist.checkpoints import shards
from cvdist.checkpoints.fence import Fence
from cvdist.checkpoints.format import META, STATE, Checkpoint
from cvdist.checkpoints.store import CheckpointStore
from cvdist.checkpoints.worker import Worker
from cvdist.config import CheckpointConfig
from cvdist.distributed import tensor_shard
from cvdist.distributed.ranks import RankInfo
from cvdist.distributed.tensor_shard import TensorShard
from cvdist.errors import Superseded, UserError
from cvdist.storage import Folder
from tests.helpers.checkpoints import SAMPLES, add, checkpoint, name_of
from tests.helpers.jobs import ROOT
from tests.helpers.waiting import wait_until

ROWS = torch.arange(12.0).reshape(6, 2)


def names(store: CheckpointStore) -> list[str]:
    return [one.name for one in store.list()]


def mark_of(store: CheckpointStore, name: str) -> float:
    with store.open(name) as folder:
        return float(ckpt.load(folder).state["mark"])


def files(uri: str) -> set[str]:
    """All files of a run but those of its fence."""
    return {name for name in Folder.open(uri, "").sizes() if not name.startswith(("attempts/", ".lock"))}


@pytest.fixture
def uri(root: str) -> str:
    return f"{root}/run"


def attempt(uri: str, keep: int = 9) -> CheckpointStore:
    """The store of a new job's first attempt."""
    fence = Fence.claim_job(uri).claim_attempt()
    return CheckpointStore(fence.folder, keep, fence)


def test_what_is_added_is_listed_and_opened_by_whoever_comes_next(uri: str) -> None:
    """As soon as `add` has returned, without an index: a restart finds what was stored just before a kill."""
    store = attempt(uri)
    assert store.list() == [] and store.best() is None
    for number, saved in enumerate([checkpoint(0, 30), checkpoint(1, correct=80), checkpoint(1, 50)]):
        saved.state["mark"] = float(number)
        add(store, saved)
        assert CheckpointStore.at(uri).list() == store.list()
    assert names(store) == ["epoch-0002-step-000050", "epoch-0001", "epoch-0001-step-000030"]
    assert [one.at for one in store.list()] == [150, 100, 30]
    best = CheckpointStore.at(uri).best()
    assert best is not None and best.name == "epoch-0001" and best.score == pytest.approx(0.8)
    assert [mark_of(store, name) for name in names(store)] == [2.0, 1.0, 0.0]
    assert files(uri) == {f"{name}/{file}" for name in names(store) for file in (STATE, META)}
    store.delete_all()
    assert store.list() == [] and files(uri) == set()


def test_a_checkpoint_that_is_gone_opens_as_a_folder_without_files(uri: str) -> None:
    store = attempt(uri)
    name = add(store, checkpoint(1))
    CheckpointStore.at(uri).delete_all()
    with store.open(name) as folder, pytest.raises(ckpt.DamagedCheckpoint, match=r"has no checkpoint\.json"):
        ckpt.load(folder)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(keep=st.integers(1, 3), correct=st.lists(st.integers(0, 100), min_size=1, max_size=6, unique=True))
def test_the_best_and_the_latest_are_kept(root: str, keep: int, correct: list[int]) -> None:
    uri = f"{root}/{uuid4().hex}"
    store = attempt(uri, keep)
    by_score = {}
    for epoch, count in enumerate(correct, start=1):
        by_score[count] = add(store, checkpoint(epoch, correct=count))
        best = {by_score[count] for count in sorted(by_score)[-keep:]}
        assert set(names(store)) == best | {by_score[count]}
    assert files(uri) == {f"{name}/{file}" for name in names(store) for file in (STATE, META)}


def test_a_damaged_checkpoint_is_passed_over_and_replaced(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    store = attempt(uri, keep=2)
    for epoch in (1, 2):
        add(store, checkpoint(epoch, correct=50 + epoch))
    folder = Folder.open(uri, "")
    content = bytearray(folder.read(f"epoch-0002/{META}"))
    content[len(content) // 2] ^= 1
    folder.write(f"epoch-0002/{META}", bytes(content))
    newer = attempt(uri, keep=2)
    with caplog.at_level("WARNING", "cvdist"):
        assert names(newer) == ["epoch-0001", "epoch-0002"]
    assert "epoch-0002 of this run is damaged" in caplog.text and "trying the one before" in caplog.text
    name = add(newer, checkpoint(2, correct=52))
    assert names(newer) == [name, "epoch-0001"]


# ------------------------------------------------------------------------------------------- a split model


def shard_of(rank: int) -> tuple[Checkpoint, dict[str, tuple[torch.Tensor, TensorShard]]]:
    """Worker `rank` of two has three of the six rows."""
    piece = tensor_shard.shard_of((6, 2), 0, 2, rank)
    saved = checkpoint(1)
    saved.state, split = shards.separate({"rows": piece.of(ROWS)}, lambda path, shape: piece)
    saved.workers = 2
    return saved, split


def test_the_shards_of_a_split_model_make_one_checkpoint(uri: str) -> None:
    store, other = attempt(uri), CheckpointStore.at(uri)
    saved, split = shard_of(0)

    def fill(folder: Path) -> None:
        shards.write(folder, 0, 2, split)
        ckpt.save(folder, saved)

    with ThreadPoolExecutor(1) as pool:
        adding = pool.submit(store.add, "epoch-0001", 0.5, 100, fill, [shards.names(2, 1)[1]], 60.0)
        wait_until(lambda: f"epoch-0001/{STATE}" in files(uri), "the first worker's files are there")
        assert not adding.done() and other.list() == []
        other.add_shard("epoch-0001", lambda folder: shards.write(folder, 1, 2, shard_of(1)[1]))
        adding.result(30)
    assert names(other) == ["epoch-0001"]
    with other.open("epoch-0001") as folder:
        assert torch.equal(ckpt.load(folder).state["rows"], ROWS)


def test_a_shard_that_does_not_come_is_an_error_and_leaves_nothing(uri: str) -> None:
    store = attempt(uri)
    with pytest.raises(
        UserError, match=r"epoch-0001 could not be written: part-00001-of-00002\.json .* within 0\.3 s"
    ):
        store.add(
            *("epoch-0001", 0.5, 100, lambda folder: ckpt.save(folder, checkpoint(1))),
            *([shards.names(2, 1)[1]], 0.3),
        )
    assert store.list() == [] and files(uri) == set()


# -------------------------------------------------------------------------- writers that are killed or stale

_WRITER = """
import sys, time
from pathlib import Path
from cvdist.checkpoints.fence import Fence
from cvdist.checkpoints.store import CheckpointStore
from cvdist.checkpoints import format as ckpt
from tests.helpers.checkpoints import checkpoint

uri, where, written = sys.argv[1:]
fence = Fence.claim_job(uri).claim_attempt()
store = CheckpointStore(fence.folder, 9, fence)

def fill(folder):
    ckpt.save(folder, checkpoint(2))
    Path(written).touch()
    if where == "before":
        time.sleep(600)

store.add("epoch-0002", 0.9, 200, fill, ["never"], 600.0)
"""


@pytest.mark.parametrize("where", ["before", "within"])
def test_a_writer_that_is_killed_in_mid_upload_has_written_no_checkpoint(
    uri: str, where: str, tmp_path: Path
) -> None:
    """`before` the first file is in its place, and `within`, when `checkpoint.json` alone is not."""
    add(attempt(uri), checkpoint(1))
    written, scratch = tmp_path / "written", tmp_path / "scratch"
    scratch.mkdir()  # for what a killed process leaves in its folder for temporary files
    writer = subprocess.Popen(
        [sys.executable, "-c", _WRITER, uri, where, str(written)],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(scratch)},
    )
    try:
        there = lambda: where == "before" or f"epoch-0002-attempt-2.1/{STATE}" in files(uri)  # noqa: E731
        wait_until(lambda: writer.poll() is not None or (written.exists() and there()), "it is in mid-upload")
        assert writer.poll() is None
    finally:
        writer.kill()
        writer.wait()
    newer = attempt(uri)
    assert names(newer) == ["epoch-0001"]
    name = add(newer, checkpoint(2))
    assert names(newer) == [name, "epoch-0001"]
    assert files(uri) == {f"{one}/{file}" for one in names(newer) for file in (STATE, META)}


def test_a_stale_writer_is_fenced_off(uri: str) -> None:
    stale = attempt(uri)
    add(stale, checkpoint(1, mark=1.0))
    newer = attempt(uri)
    add(newer, checkpoint(2, mark=2.0))
    before = files(uri)
    with pytest.raises(Superseded):
        add(stale, checkpoint(2, correct=99, mark=3.0))
    assert files(uri) == before
    assert names(newer) == ["epoch-0002-attempt-2.1", "epoch-0001"]
    assert mark_of(newer, "epoch-0002-attempt-2.1") == 2.0


def test_a_writer_becomes_stale_in_mid_upload(uri: str) -> None:
    """A newer attempt of the same job, as after a lost node whose processes go on."""
    job = Fence.claim_job(uri)
    first = job.claim_attempt()
    stale = CheckpointStore(job.folder, 9, first)
    add(stale, checkpoint(1))
    writing, go_on = threading.Event(), threading.Event()

    def fill(folder: Path) -> None:
        ckpt.save(folder, checkpoint(2))
        writing.set()
        assert go_on.wait(60)

    with ThreadPoolExecutor(1) as pool:
        adding = pool.submit(add, stale, checkpoint(2), fill)
        assert writing.wait(60)
        second = job.claim_attempt()
        newer = CheckpointStore(job.folder, 9, second)
        name = add(newer, checkpoint(1, 50))  # deletes what the stale one has written so far
        go_on.set()
        with pytest.raises(Superseded):
            adding.result(60)
    assert names(newer) == [name, "epoch-0001"]
    assert files(uri) == {f"{one}/{file}" for one in names(newer) for file in (STATE, META)}


def test_two_attempts_at_once_never_mix(uri: str) -> None:
    """Both write the same epochs at the same time, with other weights; a third one reads all the while."""
    stores = [attempt(uri, keep=2), attempt(uri, keep=2)]
    start, ended = threading.Barrier(2), threading.Event()

    def write(number: int) -> int:
        start.wait(60)
        for epoch in range(1, 6):
            try:
                add(stores[number], checkpoint(epoch, correct=epoch, mark=10.0 * number + epoch))
            except Superseded:
                return epoch
        return 0

    def read() -> list[float]:
        seen = []
        while not ended.is_set():
            for one in CheckpointStore.at(uri).list():
                with stores[1].open(one.name) as folder:
                    if (folder / META).exists():
                        seen.append(one.at / SAMPLES)
        return seen

    with ThreadPoolExecutor(3) as pool:
        reading = pool.submit(read)
        stopped = list(pool.map(write, range(2)))
        ended.set()
        reading.result(60)
    assert stopped == [1, 0]  # the older one could not write at all
    assert names(CheckpointStore.at(uri)) == [f"epoch-{epoch:04}-attempt-2.1" for epoch in (5, 4)]
    assert [mark_of(stores[1], name) for name in names(stores[1])] == [15.0, 14.0]


def test_the_newer_attempts_checkpoint_is_the_newest(uri: str) -> None:
    """Also where an older one has got further: what that one reached, a newer one has not gone on from."""
    job = Fence.claim_job(uri)
    first, second = job.claim_attempt(), job.claim_attempt()
    add(CheckpointStore(job.folder, 9, second), checkpoint(2))
    # As in the length of a request, in which a bucket can't refuse it.
    add(CheckpointStore(job.folder, 9), checkpoint(3))
    assert (first.attempt, second.attempt) == ((1, 1), (1, 2))
    assert names(CheckpointStore.at(uri)) == ["epoch-0002-attempt-1.2", "epoch-0003"]


# ------------------------------------------------------------------------------------------------ the worker


def test_a_worker_saves_while_it_goes_on_one_at_a_time(uri: str) -> None:
    fence = Fence.claim_job(uri).claim_attempt()
    worker = Worker(RankInfo(), CheckpointStore(fence.folder, 9, fence))
    go_on, second = threading.Event(), threading.Event()

    def late(folder: Path) -> None:
        assert go_on.wait(60)
        ckpt.save(folder, checkpoint(1, mark=1.0))

    worker.save_checkpoint("epoch-0001", 0.5, 100, late)
    assert worker.checkpoints() == []

    def save_second() -> None:
        worker.save_checkpoint("epoch-0002", 0.4, 200, lambda folder: ckpt.save(folder, checkpoint(2)))
        second.set()

    with ThreadPoolExecutor(1) as pool:
        saving = pool.submit(save_second)
        assert not second.wait(0.3), "two uploads were on their way at once"
        go_on.set()
        saving.result(60)
    worker.wait_for_uploads()
    assert worker.checkpoints() == ["epoch-0002", "epoch-0001"]
    with worker.open_checkpoint("epoch-0001") as folder:
        assert ckpt.load(folder).state["mark"] == 1.0
    with worker.open_best_checkpoint() as best:
        assert best is not None and ckpt.load(best).progress.epoch == 1


def test_a_worker_learns_of_a_failed_upload_with_the_next_one(tmp_path: Path) -> None:
    worker = Worker(RankInfo(), CheckpointStore.at(str(tmp_path)))

    def no_space(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    worker.save_checkpoint("epoch-0001", 0.5, 100, no_space)
    with pytest.raises(UserError, match=r"the checkpoint .*epoch-0001 could not be written: No space left"):
        worker.save_checkpoint("epoch-0002", 0.5, 200, no_space)
    assert worker.checkpoints() == [] and not list(tmp_path.iterdir())
    at_once = Worker(RankInfo(), CheckpointStore.at(str(tmp_path)), CheckpointConfig(asynchronous=False))
    with pytest.raises(UserError, match="No space left"):
        at_once.save_checkpoint("epoch-0001", 0.5, 100, no_space)


def test_checkpoints_that_come_too_soon_are_left_out_unless_they_are_the_best(tmp_path: Path) -> None:
    worker = Worker(RankInfo(), CheckpointStore.at(str(tmp_path), keep=9), min_interval=600.0)
    for epoch, correct in enumerate((50, 40, 60, 55), start=1):
        saved = checkpoint(epoch, correct=correct)
        worker.save_checkpoint(
            *(name_of(saved), correct / 100, epoch * SAMPLES),
            lambda folder, saved=saved: ckpt.save(folder, saved),  # type: ignore[misc]
        )
    worker.wait_for_uploads()
    assert worker.checkpoints() == ["epoch-0003", "epoch-0001"]
