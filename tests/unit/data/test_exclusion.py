"""Pictures that `--exclude` names."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet
import pytest

from cvdist.config import DataConfig
from cvdist.data.images import exclusion
from cvdist.data.images.listing import NO_PART, split_rows
from tests.helpers.jobs import user_error

PATHS = [f"train/a/{i}, 'b'.jpg" for i in range(20)] + [f"train/b/{i}.jpg" for i in range(20)]


def table(part=NO_PART):
    return pa.table(
        {
            "path": PATHS,
            "label": pa.array([0] * 20 + [1] * 20, pa.int32()),
            "part": pa.array([part] * 40, pa.int8()),
        }
    )


@pytest.fixture
def named(tmp_path):
    def write(rows, name="issues.csv"):
        found = pa.table({"kind": ["copy"] * len(rows), "path": rows})
        path = tmp_path / name
        (pa.parquet.write_table if name.lower().endswith("parquet") else pa.csv.write_csv)(found, path)
        return DataConfig(uri="pictures", exclude=str(path))

    return write


@pytest.mark.parametrize("name", ["issues.csv", "issues.parquet", "Issues.PARQUET"])
def test_rows_are_left_out_and_the_others_stay_where_they_were(named, name):
    before = split_rows(table(), DataConfig(uri="pictures"), ("a", "b"))
    out = [PATHS[int(rows[0])] for rows in before]
    config = named([*out, out[0], "elsewhere.jpg"], name)
    after = split_rows(table(), config, ("a", "b"))
    for mine, theirs in zip(after, before, strict=True):
        assert mine.tolist() == theirs[1:].tolist()
    assert int((~exclusion.kept_rows(table(), config)).sum()) == 2
    assert exclusion.describe(table(), config) == (
        f", without the 2 pictures of --exclude {config.exclude} (1 of its rows name no picture here)"
    )


def test_rows_may_say_that_a_picture_stays(tmp_path):
    path = tmp_path / "issues.csv"
    values = ["true", "TRUE", "yes", "1", "false", "False", "no", "0", ""]
    path.write_text("path,leave_out\n" + "".join(f"{n},{value}\n" for n, value in enumerate(values)))
    assert exclusion.read_paths(str(path)).to_pylist() == ["0", "1", "2", "3"]
    found = pa.table({"path": ["a", "b"], "leave_out": [True, False]})
    pa.parquet.write_table(found, tmp_path / "issues.parquet")
    assert exclusion.read_paths(str(tmp_path / "issues.parquet")).to_pylist() == ["a"]


def test_nothing_is_left_out_without_it():
    config = DataConfig(uri="pictures")
    assert exclusion.kept_rows(table(), config).all() and not exclusion.describe(table(), config)


def test_a_file_that_can_not_be_used(named, tmp_path):
    config = DataConfig(uri="pictures", exclude=str(tmp_path / "none.csv"))
    assert "--exclude" in user_error(exclusion.kept_rows, table(), config)
    for name in ("wrong.csv", "wrong.parquet"):
        (tmp_path / name).write_text("file,kind\na.jpg,copy\n")
        message = user_error(exclusion.read_paths, str(tmp_path / name))
        assert "no .csv or .parquet file with a column path" in message
    everything = named(PATHS[:20])
    assert "no training picture of a is left by --exclude" in user_error(
        split_rows, table(), everything, ("a", "b")
    )
    assert exclusion.kept_rows(table(), named([])).all()
