"""The index of a cache: a Parquet table of all pictures that says where their features are.

The rows are sorted by content (`cvdist.data.images.versions.by_content`). The columns are path (string), label
(int32), part (int8, the split, as in `cvdist.data.images.listing.Listing`), size (int64, bytes), version
(string, of the content, as in `cvdist.data.images.versions`), digest (first 16 bytes of the file's SHA-256),
shard (int32, its number in the manifest, -1 for a picture that can't be decoded), row (int32, in the shard),
and what was measured while the picture was decoded (`cvdist.data.images.measures`; 0 if it can't be decoded).
Where a picture may have several classes, the last column is classes (list of int32, `cvdist.data.labels`).
"""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq

from cvdist.data.contents import DIGEST_BYTES
from cvdist.data.images.measures import MEASURES
from cvdist.data.labels import CLASSES, is_multilabel

SUFFIX = ".parquet"
COMPUTED = ("path", "part", "size", "version")
"""Columns of a listing that the features depend on."""
SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("label", pa.int32()),
        ("part", pa.int8()),
        ("size", pa.int64()),
        ("version", pa.string()),
        ("digest", pa.binary(DIGEST_BYTES)),
        ("shard", pa.int32()),
        ("row", pa.int32()),
        *((name, pa.float32()) for name in MEASURES),
    ]
)


def schema_of(listing: pa.Table) -> pa.Schema:
    """Return the schema of the index of a listing's pictures."""
    return SCHEMA.append(pa.field(CLASSES, pa.list_(pa.int32()))) if is_multilabel(listing) else SCHEMA


def dump(table: pa.Table) -> bytes:
    """Write the table as the bytes of a Parquet file."""
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd")
    return file.getvalue()


def load(content: bytes) -> pa.Table:
    """Read the table from the bytes of a Parquet file."""
    table = pq.read_table(pa.BufferReader(content))
    return table.cast(schema_of(table))
