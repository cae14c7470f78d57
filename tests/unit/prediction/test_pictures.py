"""What `--data` of a prediction may name on this machine."""

from __future__ import annotations

import io
import os
import sys

import pytest

from cvdist.config import PathsConfig
from cvdist.prediction.pictures import find_pictures
from tests.helpers import pictures
from tests.helpers.jobs import user_error


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Some pictures in the present folder."""
    pictures.write(tmp_path, {"": 1, "a": 2, "a/b [x]": 1, ".hidden": 1})
    (tmp_path / "a" / "photo").write_bytes(pictures.jpeg(1))
    (tmp_path / "a" / "notes.md").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "root", "paths"),
    [
        ("a", "a", "0000.jpg 0001.jpg b [x]/0000.jpg"),
        ("a/0001.jpg", "a", "0001.jpg"),
        ("a/photo", "a", "photo"),
        (("a/0001.jpg", "0000.jpg", "a/../0000.jpg"), "", "0000.jpg a/0001.jpg"),
        (("a/b [x]", "0000.jpg"), "", "0000.jpg a/b [x]/0000.jpg"),
        ("a/*.jpg", "a", "0000.jpg 0001.jpg"),
        ("a/*", "a", "0000.jpg 0001.jpg b [x]/0000.jpg"),
        ("**/0000.jpg", "", "0000.jpg a/0000.jpg a/b [x]/0000.jpg"),
        ("a/b [[]x]/*", "a/b [x]", "0000.jpg"),
    ],
)
def test_folders_files_and_patterns(here, words, root, paths):
    found = find_pictures(words)
    assert os.path.normpath(found.root) == os.path.normpath(here / root)
    assert " ".join(found.table.column("path").to_pylist()) == paths
    assert all(size > 0 for size in found.table.column("size").to_pylist())


def test_patterns_of_any_depth_follow_no_circle_and_nothing_hidden(here):
    """Each picture once, also where a link leads back, and those of the folders that the pattern names."""
    (here / "a" / "again").symlink_to("..")
    (here / ".hidden" / "within").mkdir()
    (here / ".hidden" / "within" / "0000.jpg").write_bytes(pictures.jpeg(1))
    all_there = ["0000.jpg", "a/0000.jpg", "a/0001.jpg", "a/b [x]/0000.jpg"]
    for pattern in ("**", "**/*", "**/*.jpg", "**/**/*.jpg"):
        assert find_pictures(pattern).table.column("path").to_pylist() == all_there, pattern
    for pattern in ("**/b*", "a/**/b*/*", "**/a/b [[]x]/**"):
        assert find_pictures(pattern).table.column("path").to_pylist() == ["0000.jpg"], pattern


def test_a_list_in_a_file_or_from_standard_input(here, monkeypatch):
    content = f"a/0001.jpg\r\n\nfile://{here}/0000.jpg\na/*.jpg\n".encode("utf-8-sig")
    (here / "list.txt").write_bytes(content)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    found = [find_pictures(word) for word in ("list.txt", "-")]
    assert found[0].table.column("path").to_pylist() == ["0000.jpg", "a/0000.jpg", "a/0001.jpg"]
    assert found[0].table == found[1].table and found[1].words == "-"
    (here / "list.txt").write_text("\n")
    assert user_error(find_pictures, "list.txt").endswith("list.txt: the list is empty")


def test_many_words_are_told_apart(here):
    first, second, third = (find_pictures(["0000.jpg", *["a"] * n, "a/photo"]) for n in (2, 3, 4))
    assert "0000.jpg and 3 others (" in first.words and len({first.words, second.words, third.words}) == 3


def test_what_is_not_there_is_named(here):
    for word in ("no.jpg", "a/*.png", "no/*.jpg"):
        line = user_error(find_pictures, ["0000.jpg", word])
        assert line == f"--data {here}/{word} can't be read (there is no such file, folder or bucket)"


def test_a_table_names_pictures_alone(here):
    (here / "list.csv").write_text("id,note\na/0000,x\n0000.jpg,y\nmissing,z\n")
    found = find_pictures("list.csv", PathsConfig(path_column="id"))
    assert found.table.column("path").to_pylist() == ["0000.jpg", "a/0000.jpg"]
    assert (found.root, found.whole) == (str(here), True)
    assert find_pictures("list.csv", PathsConfig(str(here / "a"), "id")).table.column("path").to_pylist() == [
        "0000.jpg"
    ]
    assert "is a table of pictures: name it alone" in user_error(find_pictures, ["list.csv", "a"])
    assert "--path-column is for tables" in user_error(find_pictures, "a", PathsConfig(path_column="id"))
