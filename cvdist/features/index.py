"""The table of all pictures that a cache knows, as parquet: where each one's features are, and of which file.

Columns: path (string), label (int32), part (int8, see `cvdist.data.images.listing`), size (int64, bytes),
modified (int64, ns since 1970), digest (16 bytes of the file's SHA-256), shard (int32, number in the manifest;
-1 for a picture that can't be decoded), row (int32, in that shard). Sorted by path.
"""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq

from cvdist.data.images.ahead import DIGEST_BYTES as DIGEST_BYTES
from cvdist.data.images.ahead import digest_of as digest_of

SUFFIX = ".parquet"
LISTED = ("path", "label", "part", "size", "modified")
SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("label", pa.int32()),
        ("part", pa.int8()),
        ("size", pa.int64()),
        ("modified", pa.int64()),
        ("digest", pa.binary(DIGEST_BYTES)),
        ("shard", pa.int32()),
        ("row", pa.int32()),
    ]
)


def dump(table: pa.Table) -> bytes:
    """The table as a parquet file."""
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd")
    return file.getvalue()


def load(content: bytes) -> pa.Table:
    """Inverse of `dump`."""
    return pq.read_table(pa.BufferReader(content), schema=SCHEMA)
