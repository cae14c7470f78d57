"""Pictures a second from a table, from tars and from Parquet files, each against the same pictures in folders.

One comparison is of a job's start, where pictures are listed, read and decoded into an empty cache. The other
is of epochs on a node without room for decoded pictures: processes decode them, in random order. The pictures
are the 2,000 photographs of dogs and cats if CVDIST_TEST_DATA is set, else made up.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.harness import Comparison, compare
from benchmarks.photographs import write_folder
from cvdist import config as configs
from cvdist import loaders
from cvdist.config import TrainConfig
from cvdist.data.sampler import EpochOrder
from tests.helpers.forms import of_folder, write_all

PAIRS = 3
TARGETS = {"table": (0.9, 0.9), "tars": (0.9, 0.9), "Parquet": (0.85, 0.3)}


def measure() -> Iterator[Comparison]:
    """Measure pictures per second."""
    photographs = os.environ.get("CVDIST_TEST_DATA")
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        folder = Path(photographs, "dogs-vs-cats") if photographs else write_folder(root / "folder", 2_000)
        pictures = of_folder(folder)
        uris = {**write_all(folder, root, row_group=100), "table": _table(folder, root / "labels.csv")}
        roots = {"table": str(folder)}
        numbers = itertools.count()

        def beginning(form: str) -> Callable[[], float]:
            def run() -> float:
                cache = root / f"cache-{next(numbers)}"
                began = time.perf_counter()
                loaders.prepare(_config(uris[form], cache, data_root=roots.get(form, "")))
                seconds = time.perf_counter() - began
                shutil.rmtree(cache)
                return sum(map(len, pictures.values())) / seconds

            return run

        def epochs(form: str) -> Callable[[], float]:
            config = _config(uris[form], root / "cache", cache_fraction=0.0, data_root=roots.get(form, ""))
            loaders.prepare(config)
            loader = loaders.open_loader(config, torch.device("cpu"))

            def run() -> float:
                began = time.perf_counter()
                order = EpochOrder(loader.info.train_size, 64, seed=0, epoch=next(numbers))
                seen = sum(len(batch.labels) for batch in loader.train_batches(order, 0, 1))
                return seen / (time.perf_counter() - began)

            return run

        for number, (what, side) in enumerate({"beginning": beginning, "epochs": epochs}.items()):
            folders = side("folder")
            for form, targets in TARGETS.items():
                yield compare(
                    f"{what}: {form} / folders", side(form), folders, unit="pictures/s", target=targets[number],
                    pairs=PAIRS,
                )  # fmt: skip


def _config(uri: str, cache: Path, **changes: object) -> TrainConfig:
    settings = {"dataset": "images", "data": uri, "cache": str(cache), "visualize": False, **changes}
    return configs.replace(TrainConfig(), **settings)


def _table(folder: Path, path: Path) -> str:
    paths = [one for split in of_folder(folder) for one in sorted((folder / split).glob("*/*.jpg"))]
    path.write_text("\n".join(["path,label", *(f"{one},{one.parent.name}" for one in paths)]))
    return str(path)
