"""Pictures in tars and in Parquet files: which are found, with which class and split, and what is read."""

from __future__ import annotations

import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvdist import storage
from cvdist.config import PicturesConfig
from cvdist.data import forms, kept, parquet_rows
from cvdist.data.contents import Contents, digest_of
from cvdist.data.forms import archives, parquet, tars
from cvdist.data.images.decode import UndecodableError, decode
from cvdist.data.images.listing import list_pictures
from cvdist.data.images.versions import with_versions
from cvdist.errors import UserError
from cvdist.prediction.pictures import find_pictures
from tests.helpers import forms as made
from tests.helpers import pictures
from tests.helpers.jobs import user_error


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("CVDIST_CACHE", str(folder))
    return folder


def listed(uri, **settings):
    """Class, part and digest of each picture, sorted; what is read by its path has that digest."""
    config = PicturesConfig(uri=str(uri), **settings)
    listing = list_pictures(config, fewest_classes=1)
    table = with_versions(listing.table, forms.root_of(config), forms.cache_folder("")).to_pylist()
    read = list(Contents(forms.root_of(config)).read_all([row["path"] for row in table], 1))
    assert [digest_of(one).hex() for one in read] == [row["version"] for row in table]
    assert [len(one) for one in read] == [row["size"] for row in table]
    return sorted((listing.classes[row["label"]], row["part"], row["version"]) for row in table)


def summary(uri, **settings):
    found = listed(uri, **settings)
    return {key: sum(row[:2] == key for row in found) for key in {row[:2] for row in found}}


def jpegs(*names, suffix=".jpg"):
    return [(f"{name}{suffix}", pictures.jpeg(i)) for i, name in enumerate(names)]


def test_the_same_pictures_in_each_form_are_the_same(tmp_path):
    root = pictures.write(tmp_path / "folder", {"train/cat": 6, "train/dog": 5, "val/cat": 2, "val/dog": 3})
    found = {form: listed(uri) for form, uri in made.write_all(root, tmp_path).items()}
    assert len(found["folder"]) == 16
    assert all(one == found["folder"] for one in found.values()), found


# ---------------------------------------------------------------------------------------------------- tars


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_an_archive_is_read_once(tmp_path, monkeypatch, form):
    def write(count):
        content = jpegs(*(f"{label}/{i}" for i in range(count) for label in "ab"))
        if form == "tar":
            return made.tar(tmp_path / "some.tar", content)
        return made.parquet(
            tmp_path / "some.parquet", [one for _, one in content], [name[0] for name, _ in content]
        )

    monkeypatch.setattr(kept, "UNSETTLED", -(10**10))  # or it would be too new to be kept
    archive, scan = write(2), {"tar": (tars, "_members"), "parquet": (parquet, "batch_rows")}[form]
    before = listed(archive)
    with monkeypatch.context() as patched:
        patched.setattr(*scan, None)
        assert listed(archive) == before
    write(3)
    assert len(listed(archive)) == 6


LABELS = {
    "cls": ([("1.cls", b"7\n"), ("2.cls", b"10")], {"7", "10"}, "labels from .cls files"),
    "txt": ([("1.txt", b" cat "), ("2.txt", b"dog")], {"cat", "dog"}, "labels from .txt files"),
    "json": (
        [("1.json", b'{"label": 3, "id": 9}'), ("2.json", b'{"id": 8, "class_name": "dog"}')],
        {"3", "dog"},
        "labels from .json files (class_name, label)",
    ),
    "cls and a caption": (
        [("1.txt", b"a cat"), ("1.cls", b"cat"), ("2.txt", b"a dog"), ("2.cls", b"dog")],
        {"cat", "dog"},
        "labels from .cls files",
    ),
}


@pytest.mark.parametrize(("files", "classes", "line"), LABELS.values(), ids=LABELS)
def test_labels_lie_beside_the_pictures(tmp_path, caplog, files, classes, line):
    caplog.set_level("INFO", "cvdist")
    tar = made.tar(tmp_path / "some.tar", [*jpegs("1", "2"), *files])
    assert {label for label, _, _ in listed(tar)} == classes
    assert line in caplog.text and "left out" not in caplog.text


def test_what_has_no_label_or_no_picture_is_counted_in_one_line(tmp_path, caplog):
    tar = made.tar(
        tmp_path / "some.tar",
        [
            *jpegs("a/1", "a/2", "a/3.left", "a/3.right", "a/4", "b/4", "b/5"),
            ("b/5.seg.png", b"a mask"),
            *((f"{key}.cls", key[0].encode()) for key in ("a/1", "a/2", "a/3", "b/4", "b/5", "b/6", "b/7")),
            ("._b/4.jpg", b"litter"), ("b/._4.jpg", b"litter"), ("b/8.npy", b"no picture"),
        ],
    )  # fmt: skip
    assert summary(tar) == {("a", -1): 2, ("b", -1): 2}
    lines = [line for line in caplog.messages if "left out" in line]
    assert lines == [
        "data       left out: labels without a picture: 2, pictures that share their key with another one: 3, "
        "pictures without a label: 1"
    ]


FOLDERS = {
    "classes": ({"some.tar": ["cat/1", "dog/2"]}, {("cat", -1): 1, ("dog", -1): 1}),
    "splits": (
        {"some.tar": ["./train/cat/1", "./train/dog/2", "./val/cat/3"]},
        {("cat", 0): 1, ("dog", 0): 1, ("cat", 1): 1},
    ),
    "a folder around them": (
        {"1.tar": ["pets/Train/cat/1", "pets/test/cat/4"], "2.tar": ["pets/Train/dog/1", "pets/test/dog/4"]},
        {("cat", 0): 1, ("dog", 0): 1, ("cat", 1): 1, ("dog", 1): 1},
    ),
    "splits in the tars' names": (
        {"train-0.tar": ["cat/1", "dog/2"], "train-1.tar": ["cat/3"], "val.tar": ["cat/4"], "test.tar": ["b/"]},
        {("cat", 0): 2, ("dog", 0): 1, ("cat", 1): 1},
    ),
    "both": (
        {"train.tar": ["train/cat/1", "train/dog/2"], "test.tar": ["test/cat/4"]},
        {("cat", 0): 1, ("dog", 0): 1, ("cat", 1): 1},
    ),
    "splits in the tars' folders": (
        {"train/0.tar": ["cat/1", "dog/2"], "valid/0.tar": ["dog/4"]},
        {("cat", 0): 1, ("dog", 0): 1, ("dog", 1): 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("files", "found"), FOLDERS.values(), ids=FOLDERS)
def test_without_labels_the_folders_in_tars_are_those_of_the_folder_form(tmp_path, files, found):
    for name, members in files.items():
        made.tar(tmp_path / "some" / name, jpegs(*members))
    assert summary(tmp_path / "some") == found


REFUSED = {
    "compressed": (
        lambda at: (at / "some.tar.gz").write_bytes(b""),
        "some.tar.gz is compressed, which can't be read in parts: unpack it, or pack it again without",
    ),
    "compressed by another name": (
        lambda at: tarfile.open(at / "some.tar", "w:gz").close(),
        "some.tar is compressed (gzip), which can't be read in parts: unpack it, or pack it again without "
        "compression",
    ),
    "no tar": (lambda at: (at / "some.tar").write_bytes(b"x" * 1000), "some.tar is no tar"),
    "no pictures": (
        lambda at: made.tar(at / "some.tar", [("1.cls", b"1"), ("2.cls", b"2")]),
        "has no pictures, only other files, e.g. 1.cls",
    ),
    "tars in a tar": (
        lambda at: made.tar(at / "some.tar", [("n01.tar", b"1")]),
        "has no pictures, only other files, e.g. n01.tar: it holds tars, unpack them",
    ),
    "no labels": (
        lambda at: made.tar(at / "some.tar", jpegs("1", "2")),
        "has no labels: no .cls, .json or .txt file beside a picture such as 1.jpg, and no folders for the "
        "classes within the tars",
    ),
    "names with dots": (
        lambda at: made.tar(
            at / "some.tar", [*jpegs("cat.1", "cat.2"), ("cat.1.cls", b"c"), ("cat.cls", b"c")]
        ),
        "no picture has a label of its own: files are of one sample whose names are the same up to the first "
        "dot, as cat.1.jpg and cat.2.jpg: pack them with other names",
    ),
    "tars and pictures": (
        lambda at: (made.tar(at / "some.tar", jpegs("a/1", "b/2")), pictures.write(at, {"cat": 1})),
        "holds pictures as files, such as cat/0000.jpg, and others in some.tar: keep those of one form there, "
        "or name the others",
    ),
    "tars and Parquet": (
        lambda at: (made.tar(at / "b.tar", jpegs("a/1")), made.parquet(at / "a.parquet", [b"1"], ["a"])),
        "holds a.parquet and b.tar: name those of one kind",
    ),
    "a tar of no split": (
        lambda at: [made.tar(at / name, jpegs("a/1", "b/2")) for name in ("train-0.tar", "more.tar")],
        "train-0.tar is of the split train by its name, and more.tar of none: name those that you mean",
    ),
    "no column with classes": (
        lambda at: pq.write_table(
            pa.table({"image": [b"a"], "key": [1], "breed_id": [1]}), at / "some.parquet"
        ),
        "some.parquet has the columns key, breed_id: name the one with the classes with --label-column",
    ),
    "a file that is no Parquet": (
        lambda at: (made.parquet(at / "a.parquet", [b"1"], ["a"]), (at / "b.parquet").write_bytes(b"x" * 100)),
        "b.parquet can't be read (Parquet magic bytes not found",
    ),
}


@pytest.mark.parametrize(("write", "text"), REFUSED.values(), ids=REFUSED)
def test_what_can_not_be_used_is_refused_in_one_line(tmp_path, write, text):
    (tmp_path / "some").mkdir()
    write(tmp_path / "some")
    found = user_error(listed, tmp_path / "some")
    assert text in found and "\n" not in found and found.startswith(f"--data {tmp_path}/some"), found


# ------------------------------------------------------------------------------------------- damaged tars


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A tar as bytes, and the digests of its pictures."""
    long = "x" * 120  # its name takes members of its own
    members = [
        member
        for i, key in enumerate(("a1", "b1", f"a{long}", "b2"))
        for member in ((f"{key}.jpg", pictures.jpeg(i)), (f"{key}.cls", key[:1].encode()))
    ]
    path = made.tar(tmp_path_factory.mktemp("whole") / "some.tar", members)
    return path.read_bytes(), {digest_of(content).hex() for name, content in members if name.endswith("jpg")}


@given(st.data())
@settings(max_examples=150)
def test_a_cut_tar_gives_whole_pictures_or_a_line_wherever_it_is_cut(tmp_path_factory, whole, data):
    content, digests = whole
    ends = [512 * block + more for block in range(len(content) // 512) for more in (-1, 0, 1)]
    at = data.draw(st.sampled_from([end for end in ends if end >= 0]) | st.integers(0, len(content) - 1))
    folder = tmp_path_factory.mktemp("cut")
    (folder / "some.tar").write_bytes(content[:at])
    try:
        table = forms.look_unlabeled(f"{folder}/some.tar")
    except UserError as error:
        assert str(error).startswith(f"--data {folder}/some.tar") and "some.tar is cut at byte" in str(error)
        return
    read = list(Contents(str(folder)).read_all(table.column("path").to_pylist(), 1))
    cut = [one for one in read if digest_of(one).hex() not in digests]
    assert len(cut) <= 1 and read and len(read) > len(cut)
    for one in cut:  # a bad picture, which is left out, unless only the marker at its end is lost
        if digest_of(one.removesuffix(b"\xff") + b"\xff\xd9").hex() in digests:
            continue
        with pytest.raises(UndecodableError):
            decode(one, 32, "squash")


def test_a_damaged_tar_is_named_and_what_is_whole_is_used(tmp_path, caplog, whole):
    content = bytearray(whole[0])
    second = content.index(b"b1.jpg")
    content[second : second + 3] = b"xyz"  # its header's checksum is wrong
    tar = tmp_path / "some.tar"
    tar.write_bytes(content)
    assert summary(tar) == {("a", -1): 2, ("b", -1): 1}
    assert f"some.tar is damaged at byte {second:,}: its 3 whole pictures are used, how many are" in caplog.text
    text = user_error(listed, tar, max_bad_fraction=0.0)
    assert text.endswith("--max-bad-fraction is 0: fetch or pack it again") and "some.tar is damaged" in text
    tar.write_bytes(whole[0][:1000])
    assert "some.tar is cut at byte 1,000, and it has no whole picture" in user_error(listed, tar)


def test_tars_behind_one_another_are_read_as_one(tmp_path, caplog):
    parts = [made.tar(tmp_path / f"{i}", jpegs(f"a/{i}", f"b/{i}")) for i in range(2)]
    (tmp_path / "some.tar").write_bytes(b"".join(part.read_bytes() for part in parts))
    assert summary(tmp_path / "some.tar") == {("a", -1): 2, ("b", -1): 2}
    assert "damaged" not in caplog.text


# ------------------------------------------------------------------------------------------------- Parquet


@pytest.mark.parametrize("row_group", [1, 3, 100])
def test_rows_are_read_in_any_order(tmp_path, monkeypatch, row_group):
    monkeypatch.setattr(parquet_rows, "_LEAST_ROWS", 2)
    monkeypatch.setattr(parquet_rows, "_BATCH_BYTES", 1)
    content = [pictures.jpeg(i) if i % 4 else None for i in range(40)]
    path = made.parquet(tmp_path / "some.parquet", content, ["a", "b"] * 20, row_group=row_group)
    rows = [i for i in range(40) if i % 4]
    for order in (rows, rows[::-1], np.random.default_rng(0).permutation(rows).tolist()):
        found = Contents(str(tmp_path)).read_all([f"{path.name}@{row}/x.jpg" for row in order], threads=4)
        assert list(found) == [content[row] for row in order]
    for row in (0, 40):
        with pytest.raises(UserError, match=f"some.parquet@{row} can't be read"):
            Contents(str(tmp_path)).read(f"{path.name}@{row}")


def test_classes_are_named_by_the_metadata_and_what_has_none_is_left_out(tmp_path, caplog):
    content = [pictures.jpeg(i) for i in range(6)]
    names = ["tench", "goldfish"]
    made.parquet(tmp_path / "data" / "train-0.parquet", [*content[:3], None], [0, 1, 0, 1], names=names)
    made.parquet(tmp_path / "data" / "validation-0.parquet", content[3:5], [1, None], names=names)
    made.parquet(tmp_path / "data" / "test-0.parquet", content[5:], [-1], names=names)
    assert summary(tmp_path) == {("tench", 0): 2, ("goldfish", 0): 1, ("goldfish", 1): 1}
    assert "left out: rows without a picture: 1" in caplog.text
    assert "left out: pictures without a label: 2" in caplog.text
    made.parquet(tmp_path / "data" / "train-0.parquet", content[:2], [0, 2], names=names)
    assert "column label has class 2, and names of 2 classes" in user_error(listed, tmp_path)


@pytest.mark.parametrize(
    ("columns", "classes"),
    [
        ({"image": [b"1", b"2"], "label": [10, 2]}, ("10", "2")),
        ({"jpg": [b"1", b"2"], "target": [1.0, 2.0]}, ("1", "2")),
        ({"key": [b"k", b"l"], "img": [{"bytes": b"1"}, {"bytes": b"2"}], "class": ["a ", "b"]}, ("a", "b")),
        ({"photo": [b"1", b"2"], "is_cat": [True, False]}, ("false", "true")),
    ],
)
def test_usual_columns_are_found(tmp_path, columns, classes):
    pq.write_table(pa.table(columns), tmp_path / "some.parquet")
    assert tuple(label for label, _, _ in listed(tmp_path)) == classes


# ------------------------------------------------------------------------------------- names and predictions


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("{08..11}.tar", ["08.tar", "09.tar", "10.tar", "11.tar"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{0..10..5}{a,,b}", ["0a", "0", "0b", "5a", "5", "5b", "10a", "10", "10b"]),
        ("{train,val}-{0..1}.tar", ["train-0.tar", "train-1.tar", "val-0.tar", "val-1.tar"]),
        ("a{b}c", ["a{b}c"]),
    ],
)
def test_braces_mean_what_they_mean_in_bash(pattern, names):
    assert archives.expand(pattern) == names


@given(st.integers(0, 2000), st.integers(0, 300), st.integers(1, 6))
def test_padded_ranges_name_all_their_numbers(first, count, width):
    names = archives.expand(f"x-{{{first:0{width}}..{first + count:0{width}}}}.tar")
    assert [int(name[2:-4]) for name in names] == list(range(first, first + count + 1))
    assert all(len(name) >= width + 6 for name in names)


def test_relative_patterns_become_absolute_for_other_processes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for pattern in ("train-{0..9}.tar", "in/*.parquet", "*/x-?.tar"):
        assert storage.absolute_if_there(pattern) == f"{tmp_path}/{pattern}"
    for other in ("nowhere/*.tar", "s3://b/{0..9}.tar", "DEFAULT"):
        assert storage.absolute_if_there(other) == other


def test_patterns_name_archives_and_what_is_missing_is_said(tmp_path):
    for i in range(12):
        made.tar(tmp_path / "in" / f"set-{i:02}.tar", jpegs(f"a/{i}", f"b/{i}"))
    tmp_path /= "in"
    everything = listed(f"{tmp_path}/set-*.tar")
    assert len(everything) == 24
    for pattern in ("set-{00..11}.tar", "set-??.tar", "{set,}-{00..11}.tar", "../i?/set-*.tar"):
        if pattern.startswith("{"):
            assert "12 of 24 files are missing: -00.tar, -01.tar, " in user_error(
                listed, f"{tmp_path}/{pattern}"
            )
        else:
            assert listed(f"{tmp_path}/{pattern}") == everything
    assert len(listed(f"file://{tmp_path}/set-{{03,05}}.tar")) == 4
    assert "there is no such file" in user_error(listed, f"{tmp_path}/other-*.tar")
    for i in range(2):  # folders, as Spark writes them
        content = [pictures.jpeg(10 * i + j) for j in range(2)]
        made.parquet(tmp_path / f"{i}.parquet" / "part-0.snappy.parquet", content, ["a", "b"])
    assert [len(listed(f"{tmp_path}/{name}.parquet")) for name in ("1", "*", "{0,1}")] == [2, 4, 4]
    assert len(listed(made.tar(tmp_path / "set [2].tar", jpegs("a/1", "b/1")))) == 2
    assert "means more than 1,000,000 names" in user_error(listed, f"{tmp_path}/{{0..99999999}}.tar")


@pytest.mark.parametrize(
    ("uri", "root"),
    [
        ("s3://b/x/train-{000..099}.tar", "s3://b/x"),
        ("s3://b/{train,val}/a.tar", "s3://b"),
        ("s3://b/a.tar", "s3://b"),
        ("s3://u@b/data/*/x-?.parquet", "s3://u@b/data"),
        ("file:///x%20y/a.parquet", "/x y"),
        ("/a.tar", "/"),
        ("/x/y{z}/*.tar", "/x/y{z}"),
        ("s3://b/x*", "s3://b/x*"),
    ],
)
def test_paths_are_relative_to_the_folder_of_the_archives(uri, root):
    assert forms.root_of(PicturesConfig(uri=uri)) == root


def test_predictions_take_archives_too(tmp_path):
    root = pictures.write(tmp_path / "folder", {"train/cat": 3, "train/dog": 2, "valid/cat": 1, "valid/dog": 1})
    uris = made.write_all(root, tmp_path)
    wanted = sorted(digest_of(path.read_bytes()) for path in root.rglob("*.jpg"))

    def found(*words):
        named = find_pictures(words)
        read = list(Contents(named.root).read_all(named.table.column("path").to_pylist()))
        assert [len(one) for one in read] == named.table.column("size").to_pylist()
        return sorted(map(digest_of, read))

    assert all(found(uri) == wanted for uri in uris.values())
    words = [str(path) for path in sorted((tmp_path / "tars").iterdir())]
    assert found(*words) == wanted
    single = made.tar(tmp_path / "tars" / "single.tar", jpegs("deep/er/1"))  # of no split
    assert len(found(str(tmp_path / "tars"))) == len(wanted) + 1
    assert found(str(single), str(root / "train/cat/0000.jpg")) == sorted(
        [digest_of(pictures.jpeg(0)), digest_of((root / "train/cat/0000.jpg").read_bytes())]
    )
