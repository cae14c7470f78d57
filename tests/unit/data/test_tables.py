"""Tables of paths and labels: which column and which file is meant, what is left out, and what is refused."""

from __future__ import annotations

import json
import logging

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from cvdist.config import PathsConfig, PicturesConfig
from cvdist.data import forms
from cvdist.data.forms.matching import match
from cvdist.data.images.listing import list_pictures
from cvdist.errors import UserError
from tests.helpers.jobs import user_error

FILES = ("train/a.jpg", "train/b.JPG", "train/c.x.png", "test/d.jpg", "test/e.jpg")


@pytest.fixture
def root(tmp_path):
    """A folder with pictures by name, some for training and some for tests."""
    write(tmp_path / "some", FILES)
    return tmp_path / "some"


def write(folder, files):
    for path in files:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(path)


def look(table, content, **settings):
    """Path, label and split of each picture in a table with this content."""
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = forms.look(PicturesConfig(uri=str(table), **settings))
    columns = ("path", "label", "split")
    assert found.table["size"].to_pylist() == [len(path) for path in found.table["path"].to_pylist()]
    return list(zip(*(found.table[name].to_pylist() for name in columns), strict=True)), found.parts


CAT_DOG = [("train/a.jpg", "cat", ""), ("train/b.JPG", "dog", "")]
UNSPLIT = {"": forms.NO_PART}
WRITTEN = {
    "usual": "path,label\ntrain/a.jpg,cat\ntrain/b.JPG,dog\n",
    "a competition": "id,breed\na,cat\nb,dog\n",
    "names alone": "file_name,category\na.jpg,cat\nb.jpg,dog\n",
    "Excel": b"\xef\xbb\xbfImage;Class Name\r\ntrain\\a.jpg;cat\r\ntrain\\b.jpg;dog\r\n",
    "Excel with a line for itself": "sep=;\r\nimage;label\r\na;cat\r\nb;dog\r\n",
    "Excel's text": "image\tlabel\r\na\tcat\r\nb\tdog\r\n".encode("utf-16"),
    "quotes": '"image, the","label"\n"train/a.jpg","cat"\n"train/b.JPG","dog"\n',
    "two columns of any name": "x,y\ntrain/a.jpg,cat\ntrain/b.JPG,dog\n",
    "no line of names": "train/a.jpg,cat\ntrain/b.JPG,dog\n",
    "a column of row numbers": ",image_id,what\n0,a.jpg,cat\n1,b.jpg,dog\n",
    "files are surer than ids": "id,file,label\n7,a.jpg,cat\n8,b.jpg,dog\n",
    "spaces and blank lines": "path , label\n\n ./train/a.jpg , cat\ntrain/b.JPG, dog \n",
}  # fmt: skip


@pytest.mark.parametrize("content", WRITTEN.values(), ids=WRITTEN)
def test_usual_tables_are_understood(root, content):
    assert look(root / "labels.csv", content) == (CAT_DOG, UNSPLIT)


def test_lines_of_json_parquet_and_tabs_mean_the_same(root):
    rows = [{"id": "a", "label": "cat", "extra": [1]}, {"id": "b", "label": "dog", "extra": []}]
    content = "\n".join(map(json.dumps, rows))
    assert look(root / "labels.jsonl", content) == look(root / "l.tsv", "id\tlabel\na\tcat\nb\tdog\n")
    parquet.write_table(pa.Table.from_pylist(rows), root / "l.parquet")
    assert look(root / "l.parquet", (root / "l.parquet").read_bytes()) == (CAT_DOG, UNSPLIT)


def test_labels_are_text(root):
    assert [row[1] for row in look(root / "l.csv", "id,label\na,01\nb,NA\n")[0]] == ["01", "NA"]
    for values in ([1, 0], [1.0, 0.0], [True, False]):
        rows = pa.table({"id": ["a", "b", "c.x"], "label": [*values, None]})
        parquet.write_table(rows, root / "l.parquet")
        labels = [row[1] for row in look(root / "l.parquet", (root / "l.parquet").read_bytes())[0]]
        assert labels == (["true", "false"] if values[0] is True else ["1", "0"])
    text = '{"id": "a", "label": "2020-01-01"}\n{"id": "b", "label": "2021-01-01"}\n'
    assert [row[1] for row in look(root / "l.jsonl", text)[0]] == ["2020-01-01", "2021-01-01"]


def test_columns_and_root_may_be_named(root, tmp_path):
    content = "a,b,c,d\n1,train/a.jpg,cat,tr.jpg\n2,train/b.JPG,dog,tr.jpg\n"
    named = {"path_column": "b", "label_column": "c"}
    assert look(tmp_path / "t" / "x.csv", content, root=str(root), **named) == (CAT_DOG, UNSPLIT)
    for start in (f"{root}/", f"file://{root}/", "../some/"):
        rows = f"path,label\n{start}train/a.jpg,cat\n{start}train/b.JPG,dog\n"
        assert look(tmp_path / "t" / "x.csv", rows, root=str(root)) == (CAT_DOG, UNSPLIT)


def test_splits_are_those_of_a_column_or_of_folders(root, caplog):
    caplog.set_level(logging.INFO, "cvdist")
    rows = "id,label,Set\na,cat,TRAIN\nb,dog,training\nd,cat,val\ne,,test\n"
    split = [("test/d.jpg", "cat", "valid"), ("train/a.jpg", "cat", "train"), ("train/b.JPG", "dog", "train")]
    parts = {"train": forms.TRAIN_PART, "valid": forms.VALID_PART}
    assert look(root / "l.csv", rows) == (split, parts)
    assert "rows of other splits in column Set, left out: 1" in caplog.text
    found = look(root / "l.csv", "path,label\ntrain/a,cat\ntrain/b,dog\ntest/d,cat\n")
    assert found == ([(path, label, path.split("/")[0]) for path, label, _ in split], {"train": 0, "test": 1})
    plain = look(root / "l.csv", rows.replace("test", "x").replace("e,,", "e,dog,"), split_column="none")
    assert plain[1] == {"train": 0, "test": 1}  # by folders
    write(root, ["other/f.jpg"])
    assert look(root / "l.csv", "path,label\ntrain/a,cat\ntest/d,cat\nother/f,dog\n")[1] == UNSPLIT


def test_what_is_left_out_is_said(root, caplog):
    caplog.set_level(logging.INFO, "cvdist")
    rows = "id,label\na,cat\na, cat\nb,dog\nc.x,Cat\nd,\nz,dog\ny,dog\ne,cat\ne,dog\n"
    found, _ = look(root / "l.csv", rows, max_bad_fraction=0.5)
    assert found == [*CAT_DOG, ("train/c.x.png", "Cat", "")]
    said = "\n".join(record.getMessage().removeprefix("data       ") for record in caplog.records)
    assert said.replace(str(root), "DIR") == (
        "values of column label with spaces around them, taken without: 1, e.g. ' cat'\n"
        "rows without a label in column label, left out: 1\n"
        "labels that differ by case or spaces alone, taken as they are: Cat (1) and cat (3)\n"
        "2 of 8 rows named no file below DIR, e.g. z, y\n"
        "pictures below DIR that no row names: 1, e.g. test/d.jpg\n"
        "1 of 4 pictures have rows with different labels, and are left out: test/e.jpg (cat, dog)\n"
        "rows that name a picture again, with the same label: 1"
    )


def test_pictures_without_labels(root):
    (root / "l.csv").write_text("image,caption\na,x\nb.jpg,y\na,z\nq,w\n")
    assert forms.look_unlabeled(str(root / "l.csv"))["path"].to_pylist() == ["train/a.jpg", "train/b.JPG"]
    (root / "l.csv").write_text("x\na\nd\n")
    assert forms.look_unlabeled(str(root / "l.csv"))["path"].to_pylist() == ["test/d.jpg", "train/a.jpg"]


REFUSED = {
    "no column of paths": (
        "a,b\n1,2\n",
        "DIR/l.csv has the columns a, b: name the one with the pictures' paths with --path-column",
    ),
    "two columns of paths": (
        "file,url,label\na.jpg,b.jpg,c\n",
        "DIR/l.csv: file or url may hold the pictures' paths: name one with --path-column",
    ),
    "two columns of labels": (
        "file,class,label\na.jpg,1,c\n",
        "DIR/l.csv: class or label may hold the classes: name one with --label-column",
    ),
    "no column of labels": (
        "file,x,z\na.jpg,1,c\n",
        "DIR/l.csv has the columns file, x, z: name the one with the classes with --label-column",
    ),
    "no labels": (
        "file,label\na.jpg,\n",
        "DIR/l.csv: column label is empty: name another one with --label-column",
    ),
    "folds": (
        "file,label,split\na.jpg,c,1\nb.jpg,d,\n",
        "DIR/l.csv: column split has 1, (empty), and splits are train, valid and test: name another one "
        "with --split-column, or none",
    ),
    "no train": (
        "file,label,split\na.jpg,c,val\nb.jpg,d,test\n",
        "DIR/l.csv: column split has no train: test, valid",
    ),
    "no file": (
        "id,label\n1,c\n",
        "DIR/l.csv: none of 1 rows names a file, e.g. 1; DIR has 5 pictures: name the pictures' folder with"
        " --data-root, or the column with --path-column",
    ),
    "elsewhere": (
        "file,label\n/x/y/a.jpg,c\n/x/z/b.jpg,d\na.jpg,c\n",
        "DIR/l.csv: rows that name pictures outside of DIR: 2, e.g. /x/y/a.jpg: --data-root /x would do",
    ),
    "in another bucket": (
        "uri,label\ns3://b/p/a.jpg,c\n",
        "DIR/l.csv: rows that name pictures outside of DIR: 1, e.g. s3://b/p/a.jpg: --data-root s3://b/p "
        "would do",
    ),
    "above": (
        "file,label\n../a.jpg,c\n",
        "DIR/l.csv: rows that name pictures outside of DIR: 1, e.g. UP/a.jpg: --data-root UP would do",
    ),
    "in the web": (
        "url,label\nhttps://x/a.jpg,c\n",
        "DIR/l.csv: rows that name pictures outside of DIR: 1, e.g. https://x/a.jpg: addresses in the web "
        "are not read: download the pictures, and give their paths",
    ),
    "Windows": (
        "file,label\nC:\\p\\a.jpg,c\n",
        "DIR/l.csv: rows that name pictures outside of DIR: 1, e.g. C:\\p\\a.jpg: paths of another system: "
        "give paths relative to DIR",
    ),
    "several files": (
        "id,label\n1,c\n2,d\n",
        "DIR/l.csv: rows that may name several files below DIR: 1, e.g. 1 (x/1.jpg and y/1.jpg): name the "
        "folder that is meant with --data-root",
    ),
    "several labels": (
        "id,label\na,c\na,d\n",
        "DIR/l.csv: 1 of 1 pictures have rows with different labels, e.g. train/a.jpg (c, d): keep one "
        "label for each, or raise --max-bad-fraction 0.001, and they are left out",
    ),
    "a leak": (
        "id,label,split\na,c,train\na,c,valid\n",
        "DIR/l.csv: pictures in several splits: 1, e.g. train/a.jpg (train, valid): each belongs in one",
    ),
    "no rows": (
        "id,label\n",
        "DIR/l.csv has no rows",
    ),
    "one column twice": (
        "id,label,label\na,c,c\n",
        "DIR/l.csv has several columns named label: rename them",
    ),
    "another encoding": (
        "id,label\na,caf\xe9\n".encode("latin-1"),
        "DIR/l.csv can't be read: it is not text in UTF-8: save it with that encoding, in Excel as CSV "
        "UTF-8",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("content", "text"), REFUSED.values(), ids=REFUSED)
def test_what_may_be_meant_otherwise_is_refused(root, content, text):
    if text.endswith("is meant with --data-root"):
        write(root, ["x/1.jpg", "y/1.jpg", "y/2.jpg"])
    message = user_error(look, root / "l.csv", content)
    assert message.replace(str(root), "DIR").replace(str(root.parent), "UP") == f"--data {text}"


def test_other_mistakes(root):
    for settings, text in (
        ({"label_column": "x"}, r"--label-column x: --data .* has the columns id, label"),
        ({"root": str(root / "nowhere")}, "--data .*nowhere can't be read"),
    ):
        with pytest.raises(UserError, match=text):
            look(root / "l.csv", "id,label\na,c\n", **settings)
    for named in ({"uri": str(root), "label_column": "x"}, {"uri": str(root), "root": "x"}):
        with pytest.raises(UserError, match=r"--(label-column|data-root) is for tables, and --data .* is none"):
            forms.look(PicturesConfig(**named))
    with pytest.raises(UserError, match=r"tables are read from \.csv, \.tsv, \.jsonl"):
        look(root / "l.xlsx", "")
    parquet.write_table(pa.table({"blob": [b"x"], "label": [1]}), root / "l.parquet")
    with pytest.raises(UserError, match="column blob holds bytes, not paths: if they are pictures, rename"):
        forms.look_unlabeled(str(root / "l.parquet"), PathsConfig())


@pytest.mark.parametrize("layout", [["train/1.jpg"], ["train/1.jpg", "test/2.jpg"], ["1.jpg", "2.jpg"]])
def test_a_table_beside_flat_pictures_is_named(tmp_path, layout):
    write(tmp_path, [*layout, "labels.csv"])
    message = user_error(list_pictures, PicturesConfig(uri=str(tmp_path)))
    assert message.endswith(f"; if labels.csv names the classes, give --data {tmp_path}/labels.csv")


# ------------------------------------------------------------------------------------------------ which file

part = st.text("ab", min_size=1, max_size=2)
path = st.builds(
    lambda parts, suffix: "/".join(parts) + suffix,
    st.lists(part, min_size=1, max_size=3),
    st.sampled_from([".jpg", ".JPG", ".png"]),
)


@given(st.lists(path, min_size=1, max_size=8, unique=True), st.lists(part, max_size=2), st.integers(0, 2))
def test_a_name_means_the_file_of_that_path_or_the_only_one_that_ends_so(paths, above, cut):
    """Names are paths, whole, without folders above, or without a suffix: never a file of another name."""
    paths = sorted(paths)
    names = ["/".join(one.split("/")[cut:]) or one for one in paths]
    bare = [name.rpartition(".")[0] for name in names]
    deeper = ["/".join([*above, one]) for one in paths]
    for given_names, files in ((paths, paths), (names, paths), (bare, paths), (paths, deeper)):
        found = match(pa.array(given_names), pa.array(files))
        several = 0
        for name, number in zip(given_names, found.files.to_pylist(), strict=True):
            lower = [one[:-4] + one[-4:].lower() if "." in name else one[:-4] for one in files]
            wanted = name[:-4] + name[-4:].lower() if "." in name else name
            ends = [i for i, one in enumerate(lower) if f"/{one}".endswith(f"/{wanted}")]
            whole = [i for i, one in enumerate(lower) if one == wanted]
            exact = [i for i, one in enumerate(files) if one == name]
            candidates = exact or whole or ends
            several += len(candidates) > 1
            assert number == (candidates[0] if len(candidates) == 1 else None)
        assert found.unclear == several


def test_of_several_files_the_one_for_training_is_meant():
    files = pa.array(["test/1.jpg", "train/1.jpg", "x/2.jpg", "y/2.jpg"])
    found = match(pa.array(["1", "2", None, "3"]), files)
    assert found.files.to_pylist() == [1, None, None, None]
    assert (found.unclear, found.example) == (1, ("2", "x/2.jpg", "y/2.jpg"))
