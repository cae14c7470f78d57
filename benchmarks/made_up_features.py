"""Made-up feature caches, for benchmarks and tests; not a benchmark itself."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pyarrow as pa
import torch
from safetensors.torch import load
from torch import Tensor

from cvdist.data.forms import TRAIN_PART, VALID_PART
from cvdist.data.images.decode import FORMAT
from cvdist.data.images.measures import MEASURES
from cvdist.data.images.versions import by_content
from cvdist.features import index, manifest, shard
from cvdist.features.fingerprint import Fingerprint
from cvdist.features.manifest import IndexEntry, Manifest, ShardEntry
from cvdist.storage import Folder

ZEROS = 0.86  # share of the values, as VGG16's last max pooling leaves of photographs

_FLIPS: dict[str, float | str] = {"horizontal_flip": 0.5}


def sparse(rows: int, views: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Make features like VGG16's: not negative, most of them zero, with the precision of bfloat16."""
    random = torch.Generator().manual_seed(seed)
    values = torch.rand(rows, views, *shape, generator=random) * 10 + 0.01
    kept = torch.rand(values.shape, generator=random) >= ZEROS
    return (values * kept).bfloat16().to(dtype)


def write(
    uri: str | Path,
    train: int,
    valid: int,
    *,
    shape: tuple[int, ...] = (512, 7, 7),
    dtype: str = "float16",
    shard_size: int = 128,
    views: int = 1,
) -> Manifest:
    """Write a whole cache of two classes, without pictures. Row i of a split has the label i % 2."""
    folder = Folder.open(str(uri), "--features")
    shards: list[ShardEntry] = []
    columns: dict[str, list[object]] = {name: [] for name in index.SCHEMA.names}
    for part, count, stored in ((TRAIN_PART, train, views), (VALID_PART, valid, 1)):
        name = "train" if part == TRAIN_PART else "valid"
        for start in range(0, count, shard_size):
            numbers = range(start, min(start + shard_size, count))
            paths = [f"{name}/{('cat', 'dog')[i % 2]}/{i:08}.jpg" for i in numbers]
            features = sparse(len(numbers), stored, shape, shard.DTYPES[dtype], len(shards))
            packed = shard.pack(features, paths)
            object = f"shards/{len(shards):06}{shard.SUFFIX}"
            folder.write(object, packed.content)
            names = [field.name for field in dataclasses.fields(packed) if field.name != "content"]
            values = {field: getattr(packed, field) for field in names}
            shards.append(ShardEntry(object=object, stored_bytes=len(packed.content), **values))
            columns["path"] += paths
            columns["label"] += [i % 2 for i in numbers]
            columns["part"] += [part] * len(numbers)
            columns["size"] += [1000] * len(numbers)
            columns["version"] += [str(i) for i in numbers]
            columns["digest"] += [hashlib.sha256(path.encode()).digest()[:16] for path in paths]
            columns["shard"] += [len(shards) - 1] * len(numbers)
            columns["row"] += list(range(len(numbers)))
            for measure in MEASURES:
                columns[measure] += [0.5] * len(numbers)
    table = pa.table(columns, schema=index.SCHEMA)
    content = index.dump(by_content(table))
    sha = hashlib.sha256(content).hexdigest()
    entry = IndexEntry(f"index/{sha[:16]}{index.SUFFIX}", len(table), len(content), sha)
    folder.write(entry.object, content)
    mark = Fingerprint(
        model="vgg16", cut="features.30", weights="0" * 64, decode=FORMAT, size=224, resize="squash",
        mean=(0.5,) * 3, std=(0.2,) * 3, views=views, augmentation=_FLIPS if views > 1 else None,
        dtype=dtype, precision="auto",
    )  # fmt: skip
    made = Manifest(
        classes=("cat", "dog"), feature_shape=shape, fingerprint=mark, source="made up", root="made up",
        weights="made up", created="2026-01-01T00:00:00+00:00", index=entry, shards=tuple(shards), bad=(),
    )  # fmt: skip
    folder.write(manifest.NAME, manifest.dump(made))
    return made


def everything(made: Manifest, uri: str | Path) -> dict[str, Tensor]:
    """Read all features of a cache into memory: by path, (views, ...)."""
    folder = Folder.open(str(uri), "--features")
    found: dict[str, Tensor] = {}
    for entry in made.shards:
        raw = shard.unpack(folder.read(entry.object), entry)
        ids = shard.read_ids(raw)
        found |= dict(zip(ids, load(raw)["features"], strict=True))
    return found
