"""The pictures that `--exclude` names: left out of training and validation, and nothing is deleted."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class Exclusion:
    """Which rows of a table of pictures are left out.

    Attributes:
        kept: bool (n,), whether a row stays.
        unmatched: How many pictures of the file are not in the table.
    """

    kept: np.ndarray
    unmatched: int


def find_excluded(table: pa.Table, config: DataConfig) -> Exclusion:
    """Compare pictures with those that `--exclude` names.

    Args:
        table: The pictures, with the column path.
        config: Names the file.

    Raises:
        UserError: If the file can't be read.
    """
    if not config.exclude:
        return Exclusion(np.ones(len(table), dtype=bool), 0)
    named = read_paths(config.exclude)
    kept = pc.invert(pc.is_in(table.column("path"), value_set=named))
    unmatched = pc.sum(pc.invert(pc.is_in(named, value_set=table.column("path").combine_chunks()))).as_py() or 0
    return Exclusion(np.asarray(kept), unmatched)


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


def describe(exclusion: Exclusion, config: DataConfig) -> str:
    """Say how many pictures are left out, to be appended to where the data come from."""
    if not config.exclude:
        return ""
    others = f" ({exclusion.unmatched:,} of its rows name no picture here)" if exclusion.unmatched else ""
    count = int((~exclusion.kept).sum())
    return f", without the {count:,} pictures of --exclude {redact(config.exclude)}{others}"
