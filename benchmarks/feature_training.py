"""Training from a cache: against steps on a batch in memory, the book's epoch, and the first read's limit.

The features are synthetic, of VGG16's size (25,088 values): 1,600 for training, in batches of 64. The book's
epoch runs all convolutions in float32 and PyTorch's default memory format. It is timed on one batch and scaled
to 1,600 photographs. The first read fetches, verifies, decompresses and writes every shard, from a real S3
server on loopback.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import torch
import torch.nn.functional as F
import torchvision

from benchmarks import made_up_features
from benchmarks.harness import Comparison, summarize
from benchmarks.photographs import write_folder
from benchmarks.transfer_steps import book_epoch
from cvdist import config as configs
from cvdist import recipes
from cvdist.checkpoints.store import CheckpointStore
from cvdist.checkpoints.worker import Worker
from cvdist.distributed.ranks import RankInfo
from cvdist.features import manifest
from cvdist.features.copies import MappedCopy
from cvdist.features.local import LocalShards
from cvdist.storage import Folder
from cvdist.tracking import NoTracker
from cvdist.training.optimizer import build_optimizer, set_learning_rate
from cvdist.training.run import Run
from cvdist.training.setup import open_run
from cvdist.training.train import train_epoch
from tests.helpers.servers import S3Server

PICTURES, BATCH, ROUNDS = 1600, 64, 3
BOOK_BATCHES = 1
FIRST_READ_ROUNDS = 3


def measure() -> Iterator[Comparison]:
    """Measure steps per second, seconds per epoch, and bytes per second."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        made_up_features.write(root / "features", PICTURES, 4)
        run = _run(root)
        cached, memory, book = _from_the_cache(run), _in_memory(run), _the_books_epoch(root)
        rounds = [(cached(), memory(), book()) for _ in range(ROUNDS + 1)][1:]
    steps = PICTURES / BATCH
    yield summarize(
        "steps from the cache / steps on one batch in memory",
        [(steps / ours, steps / limit) for ours, limit, _ in rounds], unit="steps/s", target=0.95,
    )  # fmt: skip
    yield summarize(
        "an epoch of the book's code / an epoch from the cache",
        [(theirs, ours) for ours, _, theirs in rounds], unit="seconds", target=25,
    )  # fmt: skip
    yield from _first_read()


def _run(root: Path) -> Run:
    vgg = torchvision.models.vgg16()
    torch.save({f"features.{n}": t for n, t in vgg.features.state_dict().items()}, root / "weights.pth")
    config = configs.replace(
        recipes.find("dogs-cats-vgg16-features"),
        features=str(root / "features"), cache=str(root / "cache"), batch_size=BATCH, tracking="none",
        weights=str(root / "weights.pth"), weights_preprocessing="imagenet", name="bench",
    )  # fmt: skip
    worker = Worker(RankInfo(), CheckpointStore.at(str(root / "none")))
    # Not `build_run`, which would refuse features that are made up.
    return open_run(config, worker, NoTracker())


def _from_the_cache(run: Run) -> Callable[[], float]:
    def epoch() -> float:
        run.progress.position = 0
        started = time.perf_counter()
        train_epoch(run, 1)
        return time.perf_counter() - started

    return epoch


def _in_memory(run: Run) -> Callable[[], float]:
    """Return a function that times the same computation on one batch, over and over."""
    head = run.trained
    optimizer = build_optimizer(head, run.config.optimizer)
    set_learning_rate(optimizer, run.config.optimizer.lr)
    features = made_up_features.sparse(BATCH, 1, (512, 7, 7), torch.float32, 0)[:, 0]
    labels = torch.arange(BATCH) % 2

    def epoch() -> float:
        head.train()
        started = time.perf_counter()
        for _ in range(PICTURES // BATCH):
            with run.precision.autocast():
                scores = head(features)
            F.cross_entropy(scores.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    return epoch


def _the_books_epoch(root: Path) -> Callable[[], float]:
    epoch = book_epoch(write_folder(root / "pictures", BATCH * BOOK_BATCHES), BATCH)
    return lambda: epoch() * PICTURES / (BATCH * BOOK_BATCHES)


def _first_read() -> Iterator[Comparison]:
    """Read a whole cache from S3 to the node, and time each stage separately with as many threads."""
    threads = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as temporary, _server(Path(temporary) / "server"):
        made = made_up_features.write("s3://bucket/features", PICTURES, 4)
        folder = Folder.open("s3://bucket/features", "--features")
        assert manifest.read(folder) == made
        contents = [folder.read(entry.object) for entry in made.shards]
        work = list(zip(made.shards, contents, strict=True))
        stages: dict[str, Callable[[int], object]] = {
            "fetch": lambda i: folder.read(work[i][0].object),
            "check": lambda i: (
                hashlib.sha256(work[i][1]).digest(),
                hashlib.sha256(memoryview(bytes(work[i][0].raw_bytes))).digest(),
            ),
            "decompress": lambda i: pa.Codec("zstd").decompress(
                work[i][1], decompressed_size=work[i][0].raw_bytes, asbytes=True
            ),
            "write": lambda i: (Path(temporary) / f"{i}.written").write_bytes(bytes(work[i][0].raw_bytes)),
        }
        rounds = []
        for _ in range(FIRST_READ_ROUNDS + 1):
            seconds = {name: _timed(stage, len(work), threads) for name, stage in stages.items()}
            cache = Path(temporary) / "cache"
            shards = LocalShards(folder, made, cache, limit=1 << 40, timeout=60.0)
            copy = MappedCopy(shards, fetch_threads=threads, timeout=60.0)
            started = time.perf_counter()
            copy.expect(range(len(made.shards)))
            for number in range(len(made.shards)):
                copy.values(number)
            seconds["all"] = time.perf_counter() - started
            copy.close()
            shutil.rmtree(cache)
            rounds.append(seconds)
    rounds = rounds[1:]
    size = made.raw_bytes / 1e6
    for name in (*stages, "all"):
        mean = sum(r[name] for r in rounds) / len(rounds)
        stored = made.stored_bytes / 1e6 / mean
        print(f"  first read, {name}: {size / mean:,.0f} MB/s of features, {stored:,.0f} as stored")
    yield summarize(
        "first read from S3 / its four stages one after the other",
        [(size / r["all"], size / sum(r[name] for name in stages)) for r in rounds],
        unit="MB/s", target=0.8,
    )  # fmt: skip


def _timed(stage: Callable[[int], object], count: int, threads: int) -> float:
    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(stage, range(count)))
    return time.perf_counter() - started


@contextmanager
def _server(folder: Path) -> Iterator[None]:
    """Run SeaweedFS on loopback, and set the environment variables for it."""
    server = S3Server(folder)
    server.start()
    os.environ |= server.environment
    try:
        yield
    finally:
        server.stop(kill=True)
