"""Shuffled reading of features in batches of 64: ours, one tensor in memory, and what others read with.

Each side reads the same float16 features (25,088 values per sample) from shards on the local disk, shuffled as
well as it can shuffle, and returns a tensor and labels for each batch. litdata and webdataset are run with 0
and 2 worker processes, and the faster one counts. These libraries are not dependencies of cvdist:
`make bench-readers` installs them into a separate environment.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from benchmarks import made_up_features
from benchmarks.harness import Comparison, summarize
from cvdist.features.copies import FeatureRows, MappedCopy
from cvdist.features.local import LocalShards
from cvdist.storage import Folder

SAMPLES, BATCH, ROUNDS = 4096, 64, 3
SHAPE = (512, 7, 7)
VALUES = 512 * 7 * 7
SECONDS = 1.5  # that each side reads for, at least
WORKERS = (0, 2)

Epoch = Callable[[], Iterable[Any]]


def measure() -> Iterator[Comparison]:
    """Measure samples per second."""
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        features = made_up_features.sparse(SAMPLES, 1, SHAPE, torch.float16, 0)[:, 0]
        labels = torch.arange(SAMPLES) % 2
        others = {
            name: make(root / name, features, labels)
            for name, (needs, make) in _OTHERS.items()
            if importlib.util.find_spec(needs) or _missing(name, needs)
        }
        ours, memory = _ours(root), _in_memory(features, labels)
        rounds = []
        for _ in range(ROUNDS + 1):
            found = {"ours": _rate(ours), "memory": _rate(memory)}
            with _one_thread():
                found["memory, one thread"] = _rate(memory)
            for name, sides in others.items():
                found[name] = max(_rate(side) for side in sides)
            rounds.append(found)
    rounds = rounds[1:]
    # Ours gathers with one thread, and so leaves the other cores to what computes.
    limits = {"memory, one thread": 0.6, "memory": 0.5}
    for name, target in limits.items():
        pairs = [(r["ours"], r[name]) for r in rounds]
        title = f"reading: ours / rows of one tensor in {name}"
        yield summarize(title, pairs, unit="samples/s", target=target)
    for name in others:
        pairs = [(r["ours"], r[name]) for r in rounds]
        yield summarize(f"reading: ours / {name}", pairs, unit="samples/s", target=5)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _missing(name: str, needs: str) -> bool:
    print(f"  {name} is left out: {needs} is not installed here (make bench-readers)")
    return False


def _rate(epoch: Epoch) -> float:
    """Return samples per second over whole epochs. Starting worker processes is not included."""
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < SECONDS:
        for batch in epoch():
            features, labels = batch
            assert features.shape[0] == len(labels) and features.dtype == torch.float16
            assert features.numel() == VALUES * len(labels)
            count += len(labels)
    return count / (time.perf_counter() - started)


def _ours(root: Path) -> Epoch:
    made = made_up_features.write(root / "ours", SAMPLES, 0)
    shards = LocalShards(
        Folder.open(str(root / "ours"), "--features"), made, root / "cache", limit=1 << 40, timeout=60.0
    )
    copy = MappedCopy(shards, fetch_threads=4, timeout=60.0)
    copy.expect(range(len(made.shards)))
    rows = np.array([entry.rows for entry in made.shards])
    shard, row = np.repeat(np.arange(len(rows)), rows), np.concatenate([np.arange(count) for count in rows])
    labels, view = torch.arange(SAMPLES) % 2, np.zeros(SAMPLES, dtype=np.int64)

    def epoch() -> Iterator[Any]:
        batches = torch.randperm(SAMPLES).numpy().reshape(-1, BATCH)
        wanted = (FeatureRows(shard[batch], row[batch], view[batch]) for batch in batches)
        for batch, features in zip(batches, copy.batches(wanted), strict=True):
            yield features, labels[torch.from_numpy(batch)]

    return epoch


def _in_memory(features: torch.Tensor, labels: torch.Tensor) -> Epoch:
    def epoch() -> Iterator[Any]:
        for batch in torch.randperm(SAMPLES).split(BATCH):
            yield features.index_select(0, batch), labels.index_select(0, batch)

    return epoch


def _litdata(root: Path, features: torch.Tensor, labels: torch.Tensor) -> list[Epoch]:
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(root), chunk_bytes="64MB")
    for i, (sample, label) in enumerate(zip(features, labels.tolist(), strict=True)):
        writer[i] = {"features": sample.flatten(), "label": label}
    writer.done()
    writer.merge()

    def side(workers: int) -> Epoch:
        dataset = StreamingDataset(str(root), shuffle=True, drop_last=False)
        loader = StreamingDataLoader(
            dataset, batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0
        )
        return lambda: ((batch["features"], batch["label"]) for batch in loader)

    return [side(workers) for workers in WORKERS]


def _mosaic(root: Path, features: torch.Tensor, labels: torch.Tensor) -> list[Epoch]:
    from streaming import MDSWriter, StreamingDataset

    columns = {"features": f"ndarray:float16:{VALUES}", "label": "int"}
    with MDSWriter(out=str(root), columns=columns) as writer:
        for sample, label in zip(features, labels.tolist(), strict=True):
            writer.write({"features": sample.flatten().numpy(), "label": label})

    def side(workers: int) -> Epoch:
        dataset = StreamingDataset(local=str(root), shuffle=True, batch_size=BATCH)
        loader = DataLoader(dataset, batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0)
        return lambda: ((batch["features"], batch["label"]) for batch in loader)

    return [side(workers) for workers in WORKERS[:1]]  # two datasets of one folder would share its locks


def _webdataset(root: Path, features: torch.Tensor, labels: torch.Tensor) -> list[Epoch]:
    import webdataset

    root.mkdir()
    with webdataset.ShardWriter(str(root / "%06d.tar"), maxcount=512, verbose=0) as sink:
        for i, (sample, label) in enumerate(zip(features, labels.tolist(), strict=True)):
            sink.write({"__key__": f"{i:08}", "npy": sample.flatten().numpy(), "cls": label})
    urls = [str(path) for path in sorted(root.glob("*.tar"))]

    def side(workers: int) -> Epoch:
        dataset = (
            webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False)
            .shuffle(512)
            .decode()
            .to_tuple("npy", "cls")
        )
        loader = webdataset.WebLoader(
            dataset, batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0
        )
        return lambda: iter(loader)

    return [side(workers) for workers in WORKERS]


def _ray_parquet(root: Path, features: torch.Tensor, labels: torch.Tensor) -> list[Epoch]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import ray
    import ray.data

    root.mkdir()
    for start in range(0, SAMPLES, 512):
        values = features[start : start + 512].flatten(1).numpy()
        column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), VALUES)
        table = pa.table({"features": column, "label": pa.array(labels[start : start + 512].numpy())})
        pq.write_table(table, root / f"{start:08}.parquet", compression="zstd")
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False

    def epoch() -> Iterator[Any]:
        dataset = ray.data.read_parquet(str(root), shuffle="files")
        for batch in dataset.iter_batches(
            batch_size=BATCH, batch_format="numpy", local_shuffle_buffer_size=512, prefetch_batches=2
        ):
            rows = batch["features"]
            stacked = np.stack(rows) if rows.dtype == object else rows
            yield torch.from_numpy(np.ascontiguousarray(stacked)), torch.from_numpy(batch["label"])

    return [epoch]


_OTHERS: dict[str, tuple[str, Callable[[Path, torch.Tensor, torch.Tensor], list[Epoch]]]] = {
    "litdata": ("litdata", _litdata),
    "mosaicml-streaming": ("streaming", _mosaic),
    "webdataset": ("webdataset", _webdataset),
    "parquet through Ray Data": ("ray", _ray_parquet),
}
