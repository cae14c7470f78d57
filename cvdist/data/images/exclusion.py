"""Leaves the pictures that `--exclude` names out of training and validation. Nothing is deleted."""

from __future__ import annotations

from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from cvdist import storage
from cvdist.config import DataConfig
from cvdist.errors import UserError
from cvdist.log import redact

_LEAVE_OUT = "leave_out"
_KEEP = pa.array(["false", "no", "0", ""])


def kept_rows(table: pa.Table, config: DataConfig) -> np.ndarray:
    """Return which pictures `--exclude` does not name, bool (n,).

    Args:
        table: The pictures, with the column path.
        config: Names the file.

    Raises:
        UserError: If the file can't be read.
    """
    if not config.exclude:
        return np.ones(len(table), dtype=bool)
    return ~np.asarray(pc.is_in(table["path"], value_set=read_paths(config.exclude)))


def read_paths(uri: str) -> pa.Array:
    """Read the paths, each once, in the column path of a CSV or Parquet file.

    If there is a column leave_out, rows where it is false, no, 0 or empty are passed over.

    Raises:
        UserError: If the file can't be read or has no such column.
    """
    filesystem, path = storage.locate(uri, "--exclude")
    where = f"--exclude {redact(uri)}"
    try:
        content = pa.BufferReader(storage.read(filesystem, path))
        if PurePosixPath(path).suffix.lower() == ".parquet":
            found = pa.parquet.read_table(content)
        else:
            words = pa.csv.ConvertOptions(column_types={"path": pa.string(), _LEAVE_OUT: pa.string()})
            found = pa.csv.read_csv(content, convert_options=words)
        if _LEAVE_OUT in found.column_names:
            wanted = pc.utf8_lower(pc.fill_null(found.column(_LEAVE_OUT).cast(pa.string()), ""))
            found = found.filter(pc.invert(pc.is_in(wanted, value_set=_KEEP)))
        return found.column("path").combine_chunks().unique()
    except OSError as error:
        raise UserError(f"{where} can't be read ({storage.reason(error)})") from error
    except (pa.ArrowException, KeyError) as error:
        raise UserError(
            f"{where} is no .csv or .parquet file with a column path, as jobs/inspect.py writes them"
        ) from error


def describe(table: pa.Table, config: DataConfig) -> str:
    """Return how many pictures are left out, as text to append to the name of the data.

    Raises:
        UserError: If the file can't be read.
    """
    if not config.exclude:
        return ""
    named = read_paths(config.exclude)
    count = int((~kept_rows(table, config)).sum())
    unmatched = len(named) - (pc.sum(pc.is_in(named, value_set=table["path"].combine_chunks())).as_py() or 0)
    others = f" ({unmatched:,} of its rows name no picture here)" if unmatched else ""
    return f", without the {count:,} pictures of --exclude {redact(config.exclude)}{others}"
