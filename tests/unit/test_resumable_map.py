"""A map over a listing, whatever happens on the way. The function is cheap: a line of text for each picture."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvdist import resumable_map
from cvdist.data.quarantine import BadPicture
from cvdist.errors import UserError
from cvdist.resumable_map import ResultStore, UnitResult, stable_bounds, work_units
from cvdist.storage import Folder

# Pictures by path, with their sizes. Those of size 0 can't be decoded.
LISTINGS = st.dictionaries(st.text("abc", min_size=1, max_size=4), st.integers(0, 9), min_size=1, max_size=16)
some = settings(max_examples=15)


def table_of(listing):
    return pa.table({"path": sorted(listing), "size": [listing[path] for path in sorted(listing)]})


def units_of(listing, size=3, **identity):
    return work_units(table_of(listing), identity, stable_bounds(sorted(listing), size))


class Job:
    """A whole user of the map: lines of text in a folder. `computed` counts calls by the key of the unit."""

    def __init__(self, root, name="job"):
        self.root, self.name, self.computed = Path(root), name, Counter()

    def lines(self, unit):
        self.computed[unit.key] += 1
        pictures = list(zip(unit.paths, unit.pictures["size"], strict=True))
        good = [f"{path} {size}" for path, size in pictures if size]
        bad = [BadPicture(path, "empty") for path, size in pictures if not size]
        # What two jobs compute is not the same to the last bit.
        return UnitResult("\n".join([self.name, *good]).encode() if good else None, bad, {"good": len(good)})

    def compute(self, units, store):
        for unit in units:
            yield None
            yield store.process(self.lines, unit)

    def run(self, listing, compute=None, max_bad=1.0):
        store = ResultStore.open(str(self.root), "--output", "lines", ".txt")
        plan = store.plan(units_of(listing), store.folder.sizes())
        done = resumable_map.run(
            plan,
            compute or self.compute,
            noun="units",
            data="s3://key:secret@photos",
            pictures=len(listing),
            max_bad_fraction=max_bad,
        )
        files = [[receipt.object, receipt.size] for receipt in done.receipts if receipt.object]
        good = sum(receipt.values["good"] for receipt in done.receipts)
        store.publish(json.dumps({"files": files, "good": good}).encode(), done.bad)
        plan.remove_stale(done.receipts)
        return done

    def require_whole(self, listing=None):
        """The manifest names complete files: those of `listing`, if it is given, and of no other pictures."""
        about = json.loads((self.root / "manifest.json").read_text())
        found = []
        for name, size in about["files"]:
            content = (self.root / name).read_text()
            assert len(content) == size
            found += content.splitlines()[1:]
        assert len(found) == about["good"]
        if listing is not None:
            assert found == [f"{path} {size}" for path, size in sorted(listing.items()) if size]
            bad = [f"{path},empty" for path, size in sorted(listing.items()) if not size]
            assert (self.root / "quarantine.csv").read_text().splitlines() == ["path,reason", *bad]

    def files(self):
        return {str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file()}


@contextmanager
def a_job():
    with tempfile.TemporaryDirectory() as folder:
        yield Job(folder)


class Killed(BaseException):
    pass


@contextmanager
def killed_at(count):
    """The process dies when it is about to write or delete its `count`-th file."""
    left = [count]

    def dying(method):
        def call(*arguments):
            left[0] -= 1
            if not left[0]:
                raise Killed
            return method(*arguments)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Folder, "write", dying(Folder.write))
        patch.setattr(Folder, "delete", dying(Folder.delete))
        yield


@some
@given(LISTINGS, LISTINGS, st.lists(st.integers(1, 30), max_size=2))
def test_a_killed_job_continues_where_it_was(before, after, kills):
    with a_job() as job, a_job() as other:
        job.run(before)
        job.computed.clear()
        killed = 0
        for count in kills:
            try:
                with killed_at(count):
                    job.run(after)
            except Killed:
                killed += 1
            job.require_whole()  # that of before or that of after
        job.run(after)
        job.require_whole(after)
        again = job.run(after)
        assert again.computed == 0
        # Only what was in work when the job was killed was computed twice.
        assert sum(job.computed.values()) - len(job.computed) <= killed
        other.run(after)
        assert job.files() == other.files()


@some
@given(LISTINGS, LISTINGS)
def test_what_is_added_changed_or_removed_is_all_that_is_computed(before, after):
    with a_job() as job:
        job.run(before)
        job.computed.clear()
        done = job.run(after)
        job.require_whole(after)
        known = {unit.key for unit in units_of(before)}
        new = {unit.key: len(unit.paths) for unit in units_of(after) if unit.key not in known}
        assert job.computed == Counter(new.keys()) and done.computed == sum(new.values())
        names = {name.split("/")[1].split(".")[0][:32] for name in job.files() if "/" in name}
        assert names == {unit.key for unit in units_of(after)}


@some
@given(LISTINGS, st.data())
def test_what_is_damaged_is_computed_again(listing, data):
    with a_job() as job:
        job.run(listing)
        files = sorted(name for name in job.files() if "/" in name)
        victim = job.root / data.draw(st.sampled_from(files))
        content = victim.read_bytes()
        if victim.parent.name == "lines":
            victim.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        else:
            at, bit = data.draw(st.integers(0, len(content) - 1)), 1 << data.draw(st.integers(0, 7))
            flipped = content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]
            another = (job.root / data.draw(st.sampled_from(files))).read_bytes()
            victim.write_bytes(
                data.draw(st.sampled_from([content[:at], flipped, another, b"{}", b"[1]", b"null"]))
            )
        damaged = victim.read_bytes() != content
        job.computed.clear()
        job.run(listing)
        job.require_whole(listing)
        assert sum(job.computed.values()) == damaged


@some
@given(LISTINGS, LISTINGS, st.integers(0, 10))
def test_two_jobs_at_once_do_not_spoil_each_other(mine, theirs, when):
    """Another job begins and ends, and deletes what it does not need, while this one is at work."""
    with a_job() as job:
        other = Job(job.root, "other")

        def compute(units, store):
            for number, unit in enumerate(units):
                if number == when and not other.computed:
                    other.run(theirs)
                    other.require_whole(theirs)
                yield store.process(job.lines, unit)

        (job.root / "lines").mkdir()
        (job.root / "lines" / "notes.txt").write_text("not of a job")
        job.run(mine, compute)
        job.require_whole(mine)
        assert job.run(mine).computed == 0 and "lines/notes.txt" in job.files()


def test_results_that_vanish_all_the_time_end_the_job(tmp_path):
    job = Job(tmp_path)

    def compute(units, store):
        for receipt in (store.process(job.lines, unit) for unit in units):
            store.folder.delete(receipt.object)
            yield receipt

    with pytest.raises(UserError, match="finished units are deleted while this job runs"):
        job.run({"a": 1}, compute)
    assert "manifest.json" not in job.files()


def test_too_many_bad_pictures_end_the_job_at_once(tmp_path):
    listing, job = {f"{number:03}": number % 2 for number in range(60)}, Job(tmp_path)

    with pytest.raises(
        UserError, match=r"of 60 pictures can't be decoded, more than --max-bad-fraction 0\.1 "
    ) as e:
        job.run(listing, max_bad=0.1)
    assert "e.g. 000 (empty)" in str(e.value) and "secret" not in str(e.value)
    assert len(job.computed) < len(units_of(listing)) / 2 and "manifest.json" not in job.files()
    job.computed.clear()
    with pytest.raises(UserError, match="can't be decoded"):
        job.run(listing, max_bad=0.1)  # what is known is not computed again to be refused again
    assert not job.computed


@given(st.sets(st.text("abc/", min_size=1, max_size=8), min_size=1, max_size=300), st.integers(1, 40))
def test_units_hold_every_picture_once_in_order(paths, size):
    listing = dict.fromkeys(paths, 1)
    for bounds in (stable_bounds(sorted(paths), size), resumable_map.equal_bounds(len(paths), size)):
        cut = work_units(table_of(listing), {}, bounds)
        assert [path for unit in cut for path in unit.paths] == sorted(paths)
        assert max(len(unit.paths) for unit in cut) <= 2 * size
        assert all(len(unit.paths) >= size // 2 for unit in cut[:-1])
        assert len({unit.key for unit in cut}) == len(cut)


def test_a_picture_that_comes_or_goes_changes_few_units():
    def keys(paths, **identity):
        return {unit.key for unit in units_of(dict.fromkeys(paths, 1), 100, **identity)}

    paths = [f"{i:06}.jpg" for i in range(20_000)]
    before = keys(paths)
    assert 150 < len(before) < 250
    for changed in (["000000.a.jpg", *paths], paths[1:], [*paths[:9000], "008999.x.jpg", *paths[9000:]]):
        assert len(keys(changed) - before) <= 5
    assert not before & keys(paths, model="other")
