"""Listings of buckets, folder by folder side by side, hold what a listing of a disk holds."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs as arrow

from cvdist import storage

names = st.text("abc", min_size=1, max_size=1)
trees = st.lists(st.lists(names, min_size=1, max_size=5).map("/".join), max_size=30, unique=True)


def rows(filesystem, folder):
    batches = list(storage.walk(filesystem, folder))
    listed = [tuple(row.values()) for batch in batches for row in batch.to_pylist()]
    assert len(set(listed)) == len(listed) and all(batch.schema == storage.ENTRIES for batch in batches)
    return sorted((path, is_folder, size) for path, is_folder, size, _ in listed)


@settings(max_examples=25)
@given(trees, st.sampled_from([(16, 10_000), (3, 10_000), (3, 2), (1, 1)]))
def test_each_file_and_folder_is_listed_once(tree, limits):
    with tempfile.TemporaryDirectory() as temporary, pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "_LISTINGS", limits[0])
        patch.setattr(storage, "_MOST_FOLDERS", limits[1])
        for path in tree:
            file = Path(temporary, "top", path, "file")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(path)
        Path(temporary, "top").mkdir(exist_ok=True)
        below = Path(temporary, "top").rglob("*")
        wanted = [
            (str(one.relative_to(f"{temporary}/top")), one.is_dir(), one.is_file() and one.stat().st_size)
            for one in below
        ]
        local = arrow.LocalFileSystem()
        assert rows(local, f"{temporary}/top") == sorted(wanted)
        # For this program, all that is not the local file system itself is a bucket.
        assert rows(arrow.SubTreeFileSystem(temporary, local), "top") == sorted(wanted)


def test_what_cant_be_listed_is_an_error_wherever_it_lies(tmp_path):
    (tmp_path / "top").mkdir()
    filesystem = arrow.SubTreeFileSystem(str(tmp_path), arrow.LocalFileSystem())
    for where in (filesystem, arrow.LocalFileSystem()):
        with pytest.raises(FileNotFoundError):
            list(storage.walk(where, "nowhere"))
