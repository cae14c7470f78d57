"""The format of a shard: the features of some pictures as a safetensors file, compressed with zstd in storage.

`docs/feature-format.md` describes it for readers in other languages. The tensors of a file:

    features    float16, bfloat16 or float32 (rows, views, ...), view 0 is the picture as it is
    ids         uint8, the pictures' paths in UTF-8, one after the other
    id_ends     int64 (rows,), where in `ids` each path ends
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

from cvdist.features.manifest import ShardEntry
from cvdist.storage import file_digest

SUFFIX = ".safetensors.zst"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_CODEC = "zstd"
# Bytes that are always unpacked. A larger content may claim at most so many times its stored size.
_FREELY, _RATIO = 256 << 20, 1000
_LEVEL = 1  # higher ones take several times as long and save a few percent


class DamagedError(Exception):
    """Raised with one line that says how a file differs from what was written."""


@dataclass(frozen=True)
class Packed:
    """A shard as it is stored, with sizes and checksums that tell whether a copy is whole.

    Attributes:
        content: the compressed shard.
        raw_bytes: size in bytes without compression.
        sha256: hexadecimal checksum of the content.
        raw_sha256: hexadecimal checksum without compression.
        zeros: number of feature values that are zero.
    """

    content: bytes
    rows: int
    views: int
    raw_bytes: int
    sha256: str
    raw_sha256: str
    zeros: int


def pack(features: Tensor, ids: Sequence[str]) -> Packed:
    """Compress rows of features into the bytes of a shard.

    Args:
        features: (rows, views, ...) on the CPU, of one of the dtypes in `DTYPES`.
        ids: path of each row's picture.
    """
    names = [name.encode() for name in ids]
    raw = save(
        {
            "features": features.contiguous(),
            "ids": torch.from_numpy(np.frombuffer(b"".join(names), np.uint8).copy()),
            "id_ends": torch.tensor([len(name) for name in names], dtype=torch.int64).cumsum(0),
        }
    )
    # As bytes: a view of pyarrow's buffer claims the length of all that was allocated.
    content: bytes = pa.Codec(_CODEC, compression_level=_LEVEL).compress(raw, asbytes=True)
    return Packed(
        content=content,
        rows=features.shape[0],
        views=features.shape[1],
        raw_bytes=len(raw),
        sha256=hashlib.sha256(content).hexdigest(),
        raw_sha256=hashlib.sha256(raw).hexdigest(),
        zeros=features.numel() - int(features.count_nonzero()),
    )


def unpack(content: bytes, written: ShardEntry | Packed) -> bytes:
    """Verify and decompress a stored shard; `written` has its sizes and checksums.

    Returns:
        The content of the safetensors file.

    Raises:
        DamagedError: if the content is not what was stored.
    """
    if hashlib.sha256(content).hexdigest() != written.sha256:
        raise DamagedError("its bytes are not those that were written (checksum)")
    if written.raw_bytes > max(_FREELY, _RATIO * len(content)):
        raise DamagedError(f"it claims to unpack to {written.raw_bytes:,} bytes")
    try:
        raw: bytes = pa.Codec(_CODEC).decompress(content, decompressed_size=written.raw_bytes, asbytes=True)
    except (OSError, pa.ArrowException) as error:
        raise DamagedError("it can't be decompressed") from error
    if hashlib.sha256(raw).hexdigest() != written.raw_sha256:
        raise DamagedError("what is compressed in it is not what was written (checksum)")
    return raw


def matches(path: Path, written: ShardEntry | Packed) -> bool:
    """Return whether a file is this shard without compression."""
    return path.stat().st_size == written.raw_bytes and file_digest(path) == written.raw_sha256


def map_features(path: Path) -> Tensor:
    """Memory-map the features of an uncompressed shard, (rows, views, ...)."""
    with safe_open(path, framework="pt") as file:
        features: Tensor = file.get_tensor("features")
    return features


def read_ids(raw: bytes) -> list[str]:
    """Return the path of each row of an uncompressed shard, as it was when the shard was made."""
    tensors = load(raw)
    ids, ends = tensors["ids"].numpy().tobytes(), [0, *tensors["id_ends"].tolist()]
    return [ids[start:stop].decode() for start, stop in pairwise(ends)]
