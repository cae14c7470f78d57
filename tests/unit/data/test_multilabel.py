"""Pictures with several classes: how tables say it, the split, and the batches that come of it."""

from __future__ import annotations

import json
import logging

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from cvdist import config as configs
from cvdist import loaders
from cvdist.config import DataConfig, TrainConfig
from cvdist.data.dataset import Batch
from cvdist.data.images.listing import list_pictures, require_one_class, split_rows
from cvdist.data.labels import labels_of
from cvdist.data.mixing import Mixing, Mixture
from cvdist.data.split import multilabel_split, stratified_split
from tests.helpers import forms
from tests.helpers.jobs import user_error
from tests.helpers.multilabel import multilabel_table

CPU = torch.device("cpu")

# ------------------------------------------------------------------------------------------------------- tables

SETS = {"a": ["sea", "sun"], "b": ["sun"], "c": [], "d": ["10 cars", "2 cars", "sea"]}
CLASSES = ("2 cars", "10 cars", "sea", "sun")
ONE_A_CLASS = {
    "0 and 1": "id,sun,10 cars,sea,2 cars\na,1,0,1,\nb,1,0,0,0\nc,,,,\nd,0,1,1,1\n",
    "words": "id,sun,10 cars,sea,2 cars\na,Yes,no,TRUE,f\nb,y,n,F,\nc,,,,\nd,false,True,t,yes\n",
    "numbers with a point": "id,sun,10 cars,sea,2 cars\na,1.0,0.0,1.0,0\nb,1,0,0,0\nc,0,,,\nd,0,1,1,1.0\n",
}


@pytest.fixture
def folder(tmp_path):
    """Files that are listed, and never decoded."""
    for name in (*SETS, "e"):
        (tmp_path / f"{name}.png").write_text(name)
    return tmp_path


def found(table, content=None, **settings):
    """Classes by picture's name, and the names of the classes, of a table with this content."""
    if content is not None:
        table.write_text(content)
    listing = list_pictures(DataConfig(uri=str(table), **settings))
    rows = labels_of(listing.table, len(listing.classes))
    names = [path.removesuffix(".png") for path in listing.table["path"].to_pylist()]
    sets = [[listing.classes[i] for i in row.nonzero().flatten()] for row in rows]
    assert len(set(listing.table["label"].to_pylist())) == len({tuple(one) for one in sets})
    return dict(zip(names, map(sorted, sets), strict=True)), listing.classes


@pytest.mark.parametrize("separator", [";", "|", " and "])
def test_a_cell_may_have_several_classes(folder, caplog, separator):
    caplog.set_level(logging.INFO, "cvdist")
    cells = {name: separator.join(reversed(one)) for name, one in SETS.items()}
    cells["b"] = f" sun {separator}sun{separator} "
    rows = "".join(f'{name},"{cell}"\n' for name, cell in cells.items())
    assert found(folder / "l.csv", f"id,label\n{rows}", label_separator=separator) == (SETS, CLASSES)
    assert "rows without a class in column label, kept as pictures of no class: 1" in caplog.text


@pytest.mark.parametrize("content", ONE_A_CLASS.values(), ids=ONE_A_CLASS)
@pytest.mark.parametrize("columns", ["*", "sun,10 cars, sea,2 cars"])
def test_each_class_may_have_a_column(folder, content, columns):
    assert found(folder / "l.csv", content, label_column=columns) == (SETS, CLASSES)


def test_all_columns_are_those_that_are_neither_path_nor_split_nor_without_a_name(folder):
    rows = ",Set,file,sea,sun\n0,train,a.png,1,1\n1,train,b.png,0,1\n2,val,c.png,0,0\n"
    assert found(folder / "l.csv", rows, label_column="*")[1] == ("sea", "sun")
    columns = {"sea": [True, False, True], "sun": [True, None, False], "x": [1.0, float("nan"), 1]}
    parquet.write_table(pa.table({"id": ["a", "b", "c"], **columns}), folder / "l.parquet")
    sets = {"a": ["sea", "sun", "x"], "b": [], "c": ["sea", "x"]}
    assert found(folder / "l.parquet", label_column="*") == (sets, ("sea", "sun", "x"))
    assert found(folder / "l.parquet", label_column="sun,x")[1] == ("sun", "x")


def test_lists_are_several_labels_without_a_flag(folder):
    rows = [{"id": name, "label": one} for name, one in SETS.items()]
    assert found(folder / "l.jsonl", "\n".join(map(json.dumps, rows))) == (SETS, CLASSES)
    parquet.write_table(pa.Table.from_pylist(rows), folder / "l.parquet")
    assert found(folder / "l.parquet") == (SETS, CLASSES)
    numbers = [{"id": "a", "label": [10, 2]}, {"id": "b", "label": None}, {"id": "c", "label": [2]}]
    assert found(folder / "l.jsonl", "\n".join(map(json.dumps, numbers)))[1] == ("2", "10")


def test_a_column_with_commas_in_its_name_is_one(folder):
    rows = 'id,"a,b",a,b\na,cat,1,0\nb,dog,1,1\nc,cat,1,1\nd,dog,0,1\n'
    (folder / "l.csv").write_text(rows)
    assert list_pictures(DataConfig(uri=str(folder / "l.csv"), label_column="a,b")).classes == ("cat", "dog")
    rows = 'id,"x,y",z\na,1,0\nb,1,1\n'
    assert found(folder / "l.csv", rows, label_column='"x,y",z')[1] == ("x,y", "z")


REFUSED = {
    "an unknown label": (
        ("id,sea,sun\na,1,-1\nb,0,1\nc,0,-1\n", {"label_column": "*"}),
        "column sun has -1 in 2 rows, and the column of a class has 1 or 0 (true or false, yes or no, empty): "
        "-1 often means unknown: write 0 or 1, or leave these rows out",
    ),
    "another value": (
        ("id,sea,note\na,1,old\nb,0,\n", {"label_column": "*"}),
        "column note has old in 1 rows, and the column of a class has 1 or 0 (true or false, yes or no, "
        "empty): if it is no class, name the others with --label-column",
    ),
    "no such column": (
        ("id,sea,sun\na,1,0\nb,0,1\n", {"label_column": "sea,moon"}),
        "--label-column moon: --data DIR/l.csv has the columns id, sea, sun",
    ),
    "twice": (
        ("id,sea,sun\na,1,0\nb,0,1\n", {"label_column": "sea,sun,sea"}),
        "--label-column sea,sun,sea: sea is named twice",
    ),
    "the splits": (
        ("id,sea,sun,set\na,1,0,train\nb,0,1,val\n", {"label_column": "sea,set", "split_column": "set"}),
        "--label-column sea,set: set is the column of paths or splits",
    ),
    "a separator of columns": (
        ("id,sea,sun\na,1,0\nb,0,1\n", {"label_column": "*", "label_separator": ";"}),
        "columns sea, sun: each is one class: leave out --label-separator",
    ),
    "columns of classes that nobody names": (
        ("id,sea,sun\na,1,0\nb,0,1\n", {}),
        "columns sea, sun have 0 and 1: if each is a class, --label-column '*' takes all, and --label-column "
        "A,B those that it names",
    ),
    "nothing": (
        ("id,label\na,\nb,;\n", {"label_separator": ";"}),
        "column label names no class in any row: name another one with --label-column",
    ),
    "one class": (
        ("id,label\na,x\nb,\n", {"label_separator": ";"}),
        "has one class, x (1 pictures): a classifier needs two or more",
    ),
    "a class to validate on alone": (
        ("id,label,split\na,x;y,train\nb,y;z,val\nc,z,val\n", {"label_separator": ";"}),
        "valid has classes that train has no pictures of: z (2)",
    ),
    "rows that differ": (
        ("id,label\na,x;y\na,y\nb,y\nc,x\nc,\nd,y;x\nd,x;y\n", {"label_separator": ";"}),
        "2 of 4 pictures have rows with different labels, e.g. a.png (x + y, y); c.png (no class, x): keep one",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("given", "text"), REFUSED.values(), ids=REFUSED)
def test_what_may_be_meant_otherwise_is_refused(folder, given, text):
    (folder / "l.csv").write_text(given[0])
    message = user_error(list_pictures, DataConfig(uri=str(folder / "l.csv"), **given[1]))
    assert text in message.replace(str(folder), "DIR")


def test_lists_that_name_no_classes(folder):
    (folder / "l.jsonl").write_text('{"id": "a", "label": [0.5]}\n{"id": "b", "label": [1.5]}\n')
    chosen = DataConfig(uri=str(folder / "l.jsonl"))
    assert "column label holds lists of double, not of classes' names" in user_error(list_pictures, chosen)
    (folder / "l.jsonl").write_text('{"id": "a", "label": ["x"]}\n{"id": "b", "label": ["y"]}\n')
    chosen = DataConfig(uri=str(folder / "l.jsonl"), label_separator=";")
    assert "it holds lists of classes already: leave out --label-separator" in user_error(list_pictures, chosen)


def test_lists_beside_pictures_in_parquet_files_are_refused(tmp_path):
    forms.parquet(tmp_path / "l.parquet", [b"a", b"b"], [["x"], ["x", "y"]])
    for named in ("", "label"):
        chosen = DataConfig(uri=str(tmp_path / "l.parquet"), label_column=named)
        assert "l.parquet: column label holds lists, and several labels a picture are read from tables" in (
            user_error(list_pictures, chosen)
        )


SAID = {
    "most": (
        "a,x;y\nb,x;y\nc,z\nd,x;y\ne,z\n", {},
        "labels of column label such as x;y are one class each: --label-separator ';' reads them as several",
    ),
    "parts are labels": (
        'a,"x,y"\nb,"x,y"\nc,x\nd,y\n', {},
        "labels of column label such as x,y are one class each: --label-separator ',' reads them as several",
    ),
    "names with commas": ('a,"Smith, A"\nb,"Smith, A"\nc,"Jones, B"\nd,"Jones, B"\n', {}, ""),
    "no such separator": (
        "a,x|y\nb,x|y\nc,x\n", {"label_separator": ";"},
        "no value of column label has the --label-separator ;: no picture has several classes",
    ),
    "alike": (
        "a,x;Y\nb,y\nc,x;y\nd,Y\n", {"label_separator": ";"},
        "labels that differ by case or spaces alone, taken as they are: Y (2) and y (2)",
    ),
    "single": (
        "a,x;y\nb,y\nc,y;z\n", {"label_separator": ";"},
        "classes with a single picture, which is in training only: x, z",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "settings", "text"), SAID.values(), ids=SAID)
def test_what_may_surprise_is_said(folder, caplog, rows, settings, text):
    (folder / "l.csv").write_text(f"id,label\n{rows}")
    list_pictures(DataConfig(uri=str(folder / "l.csv"), **settings))
    said = [one.getMessage().removeprefix("data       ") for one in caplog.records]
    assert [one for one in said if not one.startswith("classes with a single") or one == text] == [text][
        : bool(text)
    ]


def test_a_column_that_no_row_says_yes_in_is_no_class(folder, caplog):
    assert found(folder / "l.csv", "id,x,y,z\na,1,0,0\nb,1,1,\n", label_column="*")[1] == ("x", "y")
    assert "columns that no row says yes in, which are no classes: z" in caplog.text


# -------------------------------------------------------------------------------------------------------- split


@given(
    st.lists(st.sets(st.integers(0, 5)), min_size=1, max_size=40),
    st.integers(0, 3),
    st.sampled_from([0.1, 0.2, 0.5]),
)
def test_each_class_is_learned_and_validated_where_that_is_possible(sets, seed, fraction):
    labels = torch.zeros(len(sets), 6, dtype=torch.bool)
    for row, one in enumerate(sets):
        labels[row, list(one)] = True
    train, valid = multilabel_split(labels, fraction, seed)
    assert sorted(train.tolist() + valid.tolist()) == list(range(len(sets)))
    assert (train.diff() > 0).all() and (valid.diff() > 0).all()
    learned, validated, total = labels[train].sum(0), labels[valid].sum(0), labels.sum(0)
    assert (learned > 0).equal(total > 0)
    for name in ((total > 1) & (validated == 0)).nonzero().flatten().tolist():
        mine = labels[labels[:, name]]  # each of them is the last one of another class to learn from
        assert (mine & (learned == 1)).any(1).all()
    again = multilabel_split(labels, fraction, seed)
    assert torch.equal(again[0], train) and torch.equal(again[1], valid)


def test_many_pictures_are_divided_in_proportion():
    random = torch.Generator().manual_seed(0)
    labels = torch.rand(5000, 20, generator=random) < torch.linspace(0.01, 0.5, 20)
    _, valid = multilabel_split(labels, 0.2, seed=1)
    assert abs(len(valid) - 1000) <= 1
    shares = labels[valid].sum(0) / labels.sum(0)
    assert ((shares - 0.2).abs() < 0.05).all()


def test_one_class_each_is_split_as_ever():
    classes = torch.randint(4, (97,), generator=torch.Generator().manual_seed(0))
    single = stratified_split(classes, 0.2, 3)
    several = multilabel_split(torch.nn.functional.one_hot(classes).bool(), 0.2, 3)
    assert all(torch.equal(one, other) for one, other in zip(single, several, strict=True))


def test_a_class_that_all_rare_ones_would_take_along_is_learned():
    """Without a second look, each pair could go to validation, and the first class with them."""
    sets = [[0, 1], [1], [0, 2], [2], [0, 3], [3]]
    labels = torch.zeros(6, 4, dtype=torch.bool)
    for row, one in enumerate(sets):
        labels[row, one] = True
    for seed in range(30):
        train, valid = multilabel_split(labels, 0.5, seed)
        assert labels[train].any(0).all() and labels[valid][:, 1:].any(0).all()


# ------------------------------------------------------------------------------------------------------ loaders


def config(table, cache, **changes):
    ours = {"dataset": "images", "data": str(table), "label_separator": ";", "cache": str(cache)}
    return configs.replace(TrainConfig(), **{**ours, "image_size": 16, "decode_workers": 1, **changes})


def opened(table, cache, **changes):
    chosen = config(table, cache, **changes)
    loaders.prepare(chosen)
    return loaders.open_loader(chosen, CPU)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return multilabel_table(tmp_path_factory.mktemp("several") / "pictures", 33)


@pytest.fixture(scope="module")
def loader(table, tmp_path_factory):
    return opened(table, tmp_path_factory.mktemp("cache"))


def expected(loader, split, indices):
    """The labels that the table has for some rows of a split."""
    numbers = [int(name.removesuffix(".png")) for name in loader.names(split, indices)]
    return torch.tensor(numbers, dtype=torch.int64).view(-1, 1) >> torch.arange(3) & 1 == 1


def test_labels_are_rows_of_classes(loader):
    assert loader.info.multilabel and loader.info.classes == ("blue", "green", "red")
    for split, size in (("train", loader.info.train_size), ("valid", loader.info.valid_size)):
        labels = loader.labels(split)
        assert labels.dtype == torch.bool and labels.shape == (size, 3)
        assert torch.equal(labels, expected(loader, split, range(size)))
    _, names = loader.pictures("train", range(loader.info.train_size))
    assert {"no class", "blue", "blue, red", "blue, green, red"} < set(names)
    valid = next(loader.valid_batches(0, 1, 4))
    assert torch.equal(valid.labels, loader.labels("valid")[valid.indices].float())


def test_mixtures_have_the_shares_of_all_classes():
    labels = torch.tensor([[1, 0, 1], [0, 1, 1], [0, 0, 0]]).float()
    images = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, 4, 4)
    mixed = Mixing(1.0, 0.0, 3, seed=0).mix(Batch(images, labels, torch.arange(3), 2), Mixture(0.75, None))
    assert torch.equal(mixed.labels, torch.tensor([[0.25, 0.75, 1.0], [0.0, 0.25, 0.25]]))


def test_bad_and_excluded_pictures_are_left_out(tmp_path):
    table = multilabel_table(tmp_path / "pictures", 24)
    (table.parent / "00007.png").write_bytes(b"no picture")
    (tmp_path / "out.csv").write_text("path\n00003.png\n")
    loader = opened(table, tmp_path / "cache", max_bad_fraction=0.1, exclude=str(tmp_path / "out.csv"))
    assert [one.path for one in loader.quarantine] == ["00007.png"]
    names = [
        name for split in ("train", "valid") for name in loader.names(split, range(len(loader.labels(split))))
    ]
    assert sorted(names) == [f"{number:05}.png" for number in range(24) if number not in (3, 7)]
    for split in ("train", "valid"):
        labels = loader.labels(split)
        assert torch.equal(labels, expected(loader, split, range(len(labels))))
    # A class of which nothing is left can't be learned.
    blue = [f"{number:05}.png" for number in range(24) if number & 1]
    (tmp_path / "out.csv").write_text("\n".join(["path", *blue]))
    chosen = config(table, tmp_path / "cache", max_bad_fraction=0.1, exclude=str(tmp_path / "out.csv"))
    assert "no training picture of blue is left by --exclude" in user_error(loaders.open_loader, chosen, CPU)


def test_other_labels_are_other_data(table, tmp_path):
    """The combinations are numbered alike, and the digest differs all the same."""
    pictures = multilabel_table(tmp_path / "pictures", 9).parent
    digests = set()
    for one in ("red", "blue;red", "red;blue"):
        rows = "".join(f"{number:05}.png,{one if number % 2 else 'blue'}\n" for number in range(9))
        (pictures / "l.csv").write_text(f"path,labels\n{rows}")
        digests.add(opened(pictures / "l.csv", tmp_path / "cache").digest())
    assert len(digests) == 2


def test_what_needs_one_class_each_is_refused(table, tmp_path):
    chosen = config(table, tmp_path, balanced_sampling=True)
    assert user_error(loaders.check, chosen) == (
        "--balanced-sampling is for pictures with one class each, these may have several: use "
        "--class-weights balanced"
    )
    assert "may have several classes a picture, and probe.py takes" in user_error(
        require_one_class, chosen.data, "probe.py"
    )


def test_the_split_is_that_of_the_contents(table, tmp_path):
    one = list_pictures(config(table, tmp_path).data)
    renamed = multilabel_table(tmp_path / "pictures", 33).parent
    rows = ["path,labels"]
    for number in range(33):
        (renamed / f"{number:05}.png").rename(renamed / f"x{97 * number % 33:03}.png")
        names = [name for bit, name in enumerate(("blue", "green", "red")) if number >> bit & 1]
        rows.append(f"x{97 * number % 33:03}.png,{'|'.join(names)}")
    (renamed / "labels.csv").write_text("\n".join(rows))
    first = opened(table, tmp_path / "cache")
    other = opened(renamed / "labels.csv", tmp_path / "cache", label_separator="|")
    assert first.digest() == other.digest()
    assert [len(part) for part in split_rows(one.table, DataConfig(), one.classes)] == [
        first.info.train_size,
        first.info.valid_size,
    ]
