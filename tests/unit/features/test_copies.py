"""A node's copy of the shards: fetched once, bounded, checked; and what becomes of it when things break."""

from __future__ import annotations

import errno
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import made_up_features
from cvdist.errors import UserError
from cvdist.features.copies import DeviceCopy, FeatureRows, MappedCopy
from cvdist.features.local import LocalShards, local_index, shard_budget, shards_folder
from cvdist.storage import Folder
from tests.helpers.jobs import user_error

SHARDS, ROWS, SHAPE = 6, 8, (64,)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A cache of six shards, and all of its features as one tensor (shards, rows, values)."""
    root = tmp_path_factory.mktemp("source")
    made = made_up_features.write(root, SHARDS * ROWS, 0, shape=SHAPE, shard_size=ROWS)
    found = made_up_features.everything(made, root)
    features = torch.stack([found[path] for path in sorted(found, key=lambda path: path[-12:])])
    return root, made, features.view(SHARDS, ROWS, *SHAPE)


class CountingFolder(Folder):
    """Notes what is read; `gate` holds reading up until it is set."""

    def __init__(self, root):
        filled = Folder.open(str(root), "--features")
        super().__init__(filled.uri, filled.filesystem, filled.root, filled.flag)
        object.__setattr__(self, "reads", [])
        object.__setattr__(self, "gate", threading.Event())
        self.gate.set()

    def read(self, name):
        self.gate.wait(30)
        self.reads.append(name)
        return super().read(name)


def shards_of(source, tmp_path, *, limit=1 << 30, timeout=20.0, folder=None):
    root, made, _ = source
    return LocalShards(folder or CountingFolder(root), made, tmp_path / "cache", limit=limit, timeout=timeout)


def copy_of(shards, **options):
    return MappedCopy(shards, **{"fetch_threads": 4, "timeout": 20.0, **options})


def rows_of(pairs):
    pairs = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return FeatureRows(pairs[:, 0], pairs[:, 1], np.zeros(len(pairs), dtype=np.int64))


def expected(source, pairs):
    return torch.stack([source[2][shard, row] for shard, row in pairs])


def local_files(tmp_path):
    return sorted((tmp_path / "cache" / "features").glob("*.safetensors"))


EVERYTHING = [(shard, row) for row in range(ROWS) for shard in range(SHARDS)]


@pytest.mark.parametrize("kind", ["mapped", "windowed", "on the device"])
def test_rows_are_gathered_across_shards(source, tmp_path, kind):
    copy = copy_of(shards_of(source, tmp_path), window=2 if kind == "windowed" else 0)
    read = copy.batches
    if kind == "on the device":
        copy = DeviceCopy(copy, torch.device("cpu"))
        read = lambda batches: (copy.at(copy.places(rows)) for rows in batches)  # noqa: E731
    copy.expect(range(SHARDS))
    batches = [[], *(EVERYTHING[i : i + 7] for i in range(0, len(EVERYTHING), 7))]
    for pairs, features in zip(batches, read(map(rows_of, batches)), strict=True):
        assert torch.equal(features, expected(source, pairs)) if pairs else features.shape == (0, *SHAPE)
    copy.close()


def test_each_shard_is_fetched_once_for_many_readers(source, tmp_path):
    folder = CountingFolder(source[0])

    def read(seed):
        copy = copy_of(shards_of(source, tmp_path, folder=folder))
        order = np.random.default_rng(seed).permutation(SHARDS)
        copy.expect(order)
        assert torch.equal(copy.gather(rows_of(EVERYTHING)), expected(source, EVERYTHING))
        copy.close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))
    assert sorted(folder.reads) == sorted(shard.object for shard in source[1].shards)
    read(5)
    assert len(folder.reads) == SHARDS  # and a later job finds them


def test_the_copy_stays_within_its_bound_and_mapped_shards_stay_readable(source, tmp_path):
    size = source[1].shards[0].raw_bytes
    shards = shards_of(source, tmp_path, limit=3 * size)
    mapped = []
    for number in range(SHARDS):
        mapped.append(shards.open(number))
        assert sum(path.stat().st_size for path in local_files(tmp_path)) <= 3 * size
    assert len(local_files(tmp_path)) == 3
    for number, features in enumerate(mapped):  # the first three have no name any more
        assert torch.equal(features[:, 0], source[2][number])


def test_what_was_used_longest_ago_makes_room(source, tmp_path):
    size = source[1].shards[0].raw_bytes
    folder = CountingFolder(source[0])
    shards = shards_of(source, tmp_path, limit=2 * size, folder=folder)
    for number in (0, 1, 0, 2, 0):  # 1 has to go for 2
        shards.open(number)
        time.sleep(0.01)
    assert len(folder.reads) == 3


def test_a_windowed_copy_lets_go_of_what_lies_behind(source, tmp_path):
    folder = CountingFolder(source[0])
    size = source[1].shards[0].raw_bytes
    copy = copy_of(shards_of(source, tmp_path, limit=3 * size, folder=folder), window=1)
    copy.expect(range(SHARDS))
    for number in range(SHARDS):
        assert torch.equal(copy.gather(rows_of([(number, 3)]))[0], source[2][number, 3])
        assert len(copy.arriving) <= 3
    assert len(folder.reads) == SHARDS  # each of them once
    copy.close()


def test_fetching_overlaps_reading(source, tmp_path):
    """The first batch is there while later shards are not."""
    folder = CountingFolder(source[0])
    copy = copy_of(shards_of(source, tmp_path, folder=folder), fetch_threads=1)
    arrived, release = folder.read, threading.Event()

    def held(name):
        if name == source[1].shards[3].object:
            release.wait(30)
        return arrived(name)

    object.__setattr__(folder, "read", held)
    copy.expect([0, 1, 3, 2])
    assert torch.equal(copy.gather(rows_of([(0, 1), (1, 2)])), expected(source, [(0, 1), (1, 2)]))
    assert not copy.arriving[2].done()
    release.set()
    assert torch.equal(copy.gather(rows_of([(2, 1)])), expected(source, [(2, 1)]))
    copy.close()


# ------------------------------------------------------------------------------------------------------ faults


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied"])
def test_a_damaged_local_copy_is_fetched_again(source, tmp_path, damage):
    folder = CountingFolder(source[0])
    shards_of(source, tmp_path, folder=folder).open(2)
    (path,) = local_files(tmp_path)
    content = path.read_bytes()
    changed = {"flipped": content[:-9] + bytes([content[-9] ^ 1]) + content[-8:], "cut": content[:-5]}
    path.write_bytes(changed.get(damage, b""))
    features = shards_of(source, tmp_path, folder=folder).open(2)
    assert torch.equal(features[:, 0], source[2][2]) and len(folder.reads) == 2


def test_an_unchanged_copy_is_not_read_again_to_check_it(source, tmp_path, monkeypatch):
    shards_of(source, tmp_path).open(1)
    monkeypatch.setattr("cvdist.features.shard.matches", None)
    shards_of(source, tmp_path).open(1)


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "another"])
def test_a_damaged_shard_in_storage_is_one_clear_error(tmp_path, damage):
    root = tmp_path / "source"
    made = made_up_features.write(root, 16, 0, shape=SHAPE, shard_size=8)
    path = root / made.shards[1].object
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        other = (root / made.shards[0].object).read_bytes()
        changed = {"flipped": content[:99] + bytes([content[99] ^ 16]) + content[100:], "cut": content[:-1]}
        path.write_bytes(changed.get(damage, other))
    copy = copy_of(LocalShards(CountingFolder(root), made, tmp_path / "cache", limit=1 << 30, timeout=20.0))
    copy.expect([0, 1])
    text = user_error(lambda: list(copy.batches([rows_of([(0, 1), (1, 2)])])))
    assert made.shards[1].object in text
    assert ("there is no such file" in text) if damage == "gone" else ("checksum" in text and "run" in text)
    assert copy.gather(rows_of([(0, 1)])).shape == (1, *SHAPE)
    copy.close()


def test_a_full_disk_is_one_clear_error(source, tmp_path, monkeypatch):
    shards = shards_of(source, tmp_path)
    before, failed = Path.write_bytes, []

    def full(self, content):
        if self.name.endswith(".arriving"):
            failed.append(self.name)
            before(self, content[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return before(self, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"can't take the features \(No space left on device; .* GB free\)"):
        shards.open(0)
    assert len(failed) == 2  # after making room, once more
    monkeypatch.undo()
    assert not list(shards_folder(tmp_path / "cache").glob(".*"))  # nothing half-written stays
    assert torch.equal(shards.open(0)[:, 0], source[2][0])


def test_a_disk_that_fills_up_gives_up_older_copies(source, tmp_path, monkeypatch):
    shards = shards_of(source, tmp_path)
    shards.open(0)
    before, failed = Path.write_bytes, []

    def full_once(self, content):
        if self.name.endswith(".arriving") and not failed:
            failed.append(self.name)
            raise OSError(errno.ENOSPC, "No space left on device")
        return before(self, content)

    monkeypatch.setattr(Path, "write_bytes", full_once)
    assert torch.equal(shards.open(1)[:, 0], source[2][1])
    assert len(local_files(tmp_path)) == 1


def test_waiting_is_bounded(source, tmp_path):
    folder = CountingFolder(source[0])
    folder.gate.clear()
    copy = copy_of(shards_of(source, tmp_path, folder=folder), timeout=0.3)
    with pytest.raises(UserError, match=r"waited 0.3 s for shards/.*: raise --data-timeout"):
        copy.gather(rows_of([(0, 0)]))
    folder.gate.set()
    copy.close()


def test_a_storage_that_comes_back_is_asked_again(source, tmp_path):
    folder = CountingFolder(source[0])
    copy = copy_of(shards_of(source, tmp_path, folder=folder))
    good = folder.read
    object.__setattr__(folder, "read", lambda name: (_ for _ in ()).throw(UserError("away")))
    with pytest.raises(UserError, match="away"):
        copy.gather(rows_of([(0, 0)]))
    object.__setattr__(folder, "read", good)
    assert torch.equal(copy.gather(rows_of([(0, 0)]))[0], source[2][0, 0])
    copy.close()


def test_the_index_is_fetched_once_a_node(source, tmp_path):
    folder = CountingFolder(source[0])
    first = local_index(folder, source[1], tmp_path / "cache", 5.0)
    assert local_index(folder, source[1], tmp_path / "cache", 5.0) == first and len(folder.reads) == 1
    (path,) = (tmp_path / "cache" / "features").glob("*.index")
    path.write_bytes(b"cut")
    assert local_index(folder, source[1], tmp_path / "cache", 5.0) == first


def test_room_counts_what_is_there_already(source, tmp_path):
    shards = shards_of(source, tmp_path)
    before = shard_budget(tmp_path / "cache", 0.5)
    for number in range(SHARDS):
        shards.open(number)
    assert abs(shard_budget(tmp_path / "cache", 0.5) - before) < 64 << 20  # others use the disk as well
